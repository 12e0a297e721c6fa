"""DINO (arXiv 2104.14294): give every crop the class that a centred, sharpened EMA teacher gives a large one."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from stablerep.arch import accept_other_sizes, patch_size
from stablerep.data.augment import View
from stablerep.losses import dino_loss
from stablerep.methods.base import Encoded
from stablerep.methods.teacher import SEEN, WithTeacher
from stablerep.runtime import dist
from stablerep.runtime.errors import UsageError
from stablerep.train_config import TrainConfig

FIRST_TEMPERATURE = 0.04  # of the teacher
CENTRE_MOMENTUM = 0.9


class DINO(WithTeacher):
    """Self-distillation with no labels, on two large crops and several small ones."""

    default_momentum = 0.996

    def __init__(self, encoder: Any, config: TrainConfig) -> None:
        accept_other_sizes(encoder)
        head = PrototypeHead(encoder.num_features, config.head_hidden, config.head_out, config.dino.prototypes)
        super().__init__(encoder, config, head)
        self.averages["centre"] = torch.zeros(config.dino.prototypes)
        self.keys = config.dino
        self.frozen, self.teacher_temperature = False, config.dino.teacher_temperature

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        """Crops fit the patches and each other."""
        super().check(config)
        dino, patch = config.dino, patch_size(config.arch, config.image_size)
        if dino.local_size < patch or dino.local_size % patch:
            raise UsageError(f"--dino.local-size {dino.local_size} is not a multiple of the {patch} pixels of a patch")
        if not config.crop_min < dino.split < 1:
            raise UsageError(f"--dino.split {dino.split:g} is not between --crop-min {config.crop_min:g} and 1")
        if dino.local_crops < 0 or dino.prototypes < 1 or dino.teacher_temperature <= 0:
            raise UsageError(
                "--dino.prototypes and --dino.teacher-temperature must be positive, --dino.local-crops not negative"
            )

    @classmethod
    def views(cls, config: TrainConfig) -> list[View]:
        """Two large crops, augmented as BYOL's, then the small ones, half of which are blurred."""
        dino = config.dino
        large = [replace(view, crop_min=dino.split) for view in super().views(config)]
        small = replace(large[0], size=dino.local_size, crop_min=config.crop_min, crop_max=dino.split, blur_p=0.5)
        return large + [small] * dino.local_crops

    def loss(self, encoded: Encoded, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Equation 3 of the paper. The head knows no BatchNorm: it may see all views at once."""
        views = [encoded[f"view{v}"] for v in range(len(encoded) - SEEN)]
        student = self.head(torch.cat(views), self.frozen).unflatten(0, (len(views), len(ids)))
        teacher = torch.stack(self.targets(encoded)).float()
        self.batch_centre = dist.sum_over_ranks(teacher.mean((0, 1))) / dist.gathering()
        loss = dino_loss(student, teacher, self.averages["centre"], self.temperature, self.teacher_temperature)
        return loss, self.health(encoded)

    def before_step(self, step: int, steps: int, epoch: float) -> None:
        """The teacher's weights and temperature; whether the prototypes stand still."""
        super().before_step(step, steps, epoch)
        warm = min(1.0, epoch / self.keys.warmup_epochs) if self.keys.warmup_epochs else 1.0
        self.teacher_temperature = FIRST_TEMPERATURE + warm * (self.keys.teacher_temperature - FIRST_TEMPERATURE)
        self.frozen = epoch < self.keys.freeze_epochs

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        """The averages, and the centre (equation 4)."""
        super().after_step(step, steps)
        self.averages["centre"].lerp_(self.batch_centre, 1 - CENTRE_MOMENTUM)


class PrototypeHead(nn.Module):
    """MLP of three layers with GELU, L2 normalisation, and weight-normed prototypes of length 1 (appendix C)."""

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        layers = [nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, bottleneck)]
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.layers = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
        self.prototypes = nn.Linear(bottleneck, prototypes, bias=False)

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """[B, width] -> [B, prototypes]: cosine of each row with each prototype. Without a gradient AdamW leaves the
        direction of a `frozen` prototype as it is (weight decay changes the length, which does not count)."""
        rows = normalize(self.layers(x).float(), dim=1, eps=1e-6)
        weight = self.prototypes.weight.detach() if frozen else self.prototypes.weight
        return linear(rows.to(x.dtype), normalize(weight.float(), dim=1).to(x.dtype))
