"""What BYOL, MoCo v3 and DINO share: a teacher whose weights are an exponential moving average of the student's."""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stablerep.collapse import collapse
from stablerep.data.augment import View
from stablerep.methods.base import Encoded, Method
from stablerep.runtime.errors import UsageError
from stablerep.train_config import TrainConfig

SEEN = 2  # views that the teacher sees, the first ones


class WithTeacher(Method):
    """A student (encoder and head) and its teacher, which sees the first two views of each image.

    The teacher's weights are `averages`: float32, and so in checkpoints. Before each step they are put, in the training
    dtype, into `teacher`, which runs. They average the student's weights in the training dtype, which every rank has, and
    not the float32 masters, which ZeRO spreads over the ranks and which would have to be gathered at every step. With bf16
    that rounds each weight to 2^-9 of itself, as the student's own forward pass does; the rounding does not add up, and no
    small update is lost, for the average is float32: it follows when the student's weight goes on to its next bf16 value.
    """

    unit = "image"
    default_momentum: ClassVar[float]

    def __init__(self, encoder: Any, config: TrainConfig, head: nn.Module) -> None:
        super().__init__(encoder, config)
        self.head = head
        self.teacher = copy.deepcopy(nn.ModuleDict({"encoder": encoder, "head": head})).requires_grad_(False)
        self.averages = {name: p.detach().float().clone() for name, p, _ in self._pairs()}
        self.momentum = self.default_momentum if config.momentum is None else config.momentum
        self.log_every, self.measuring = config.log_every, True

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        """The momentum is a share."""
        if config.momentum is not None and not 0 <= config.momentum <= 1:
            raise UsageError(f"--momentum {config.momentum:g} is not within 0 and 1")

    @classmethod
    def views(cls, config: TrainConfig) -> list[View]:
        """BYOL's two views (appendix B): the first always blurred; the second seldom, and sometimes solarised."""
        view = View(config.image_size, config.crop_min, downsample_p=config.downsample_p, saturation=0.2)
        return [replace(view, blur_p=1.0), replace(view, blur_p=0.1, solarize_p=0.2)]

    def forward(self, views: list[Tensor], tokens: Tensor | None) -> Encoded:
        """Features [B, width]: `view0`, `view1`, ... of the student; `target0`, `target1` of the teacher, no gradient."""
        encoded = {f"view{v}": self.encoder(images) for v, images in enumerate(views)}
        with torch.no_grad():
            seen = [] if self.repeating else views[:SEEN]
            return encoded | {f"target{v}": self.teacher["encoder"](images) for v, images in enumerate(seen)}

    @torch.no_grad()
    def targets(self, encoded: Encoded) -> list[Tensor]:
        """The teacher's head on its features, one view at a time: [B, out] each."""
        return [self.teacher["head"](encoded[f"target{v}"]) for v in range(SEEN)]

    def health(self, encoded: Encoded) -> dict[str, Tensor]:
        """Measures of collapse of the student's features, at steps that are logged."""
        return collapse(encoded["view0"]) if self.measuring else {}

    @torch.no_grad()
    def before_step(self, step: int, steps: int, epoch: float) -> None:
        """Give the teacher the averages."""
        for name, _, taught in self._pairs():
            taught.copy_(self.averages[name])
        self.measuring = (step + 1) % self.log_every == 0 or step + 1 == steps

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        """Move the averages towards the student."""
        share = 1 - momentum(self.momentum, step, steps)
        for name, p, _ in self._pairs():
            self.averages[name].lerp_(p.float(), share)

    def _pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """The student's trained weights by name, each with the teacher's."""
        for part in ("encoder", "head"):
            student, teacher = getattr(self, part), self.teacher[part]
            for (name, p), taught in zip(student.named_parameters(), teacher.parameters(), strict=True):
                if p.requires_grad:
                    yield f"teacher.{part}.{name}", p, taught


def momentum(start: float, step: int, steps: int) -> float:
    """The teacher's momentum: from `start` to 1 along half a cosine (BYOL, arXiv 2006.07733, section 3.3)."""
    return 1 - (1 - start) * (math.cos(math.pi * step / steps) + 1) / 2
