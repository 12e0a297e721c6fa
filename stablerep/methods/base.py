"""What the training loop wants of a method: a sampling unit, views of its images, an encoding, a loss, hooks around a step."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stablerep.data.augment import View
from stablerep.heads import projection_head
from stablerep.runtime import dist
from stablerep.train_config import TrainConfig

Encoded = dict[str, Tensor]


class Method(nn.Module):
    """An encoder with what a method trains beside it.

    `unit` is what an epoch counts: a `caption` (which fills `images_per_caption` rows of a batch) or an `image` (one row).
    `forward` encodes rows one by one and may be called on parts of a batch; `loss` sees a rank's whole batch and may
    gather over ranks. BatchNorm and everything else that mixes rows belongs into `loss`.
    """

    unit: ClassVar[str]
    reads_text: ClassVar[bool] = False
    default_temperature: ClassVar[float] = 0.1

    def __init__(self, encoder: Any, config: TrainConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.repeating = False  # rows are encoded a second time, for gradients only (GradCache)
        # Float32 tensors beside the trained ones, equal on all ranks (an EMA teacher's weights): checkpoints hold them.
        self.averages: dict[str, Tensor] = {}
        self.temperature = self.default_temperature if config.temperature is None else config.temperature
        # Lengths of the random orders that `forward` gets of every row, after the views (MAE's masks).
        self.shuffles: list[int] = []

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        """Raise UsageError on a value of the method's own keys that cannot work."""

    @classmethod
    def rows_per_unit(cls, images_per_caption: int) -> int:
        """Rows of the batch that one unit fills."""
        return images_per_caption if cls.unit == "caption" else 1

    @classmethod
    def views(cls, config: TrainConfig) -> list[View]:
        """The crops wanted of every row; one unless a method says otherwise."""
        return [View(config.image_size, config.crop_min, downsample_p=config.downsample_p)]

    def forward(self, views: list[Tensor], tokens: Tensor | None) -> Encoded:
        """Encode rows: views [B, 3, S, S] each, then an int64 [B, n] for each of `shuffles`; tokens [captions, T] of the
        captions of these rows where `reads_text`. Returns float tensors whose rows belong to the rows (or captions) given,
        in order."""
        raise NotImplementedError

    def loss(self, encoded: Encoded, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss of this rank's rows (ids [B] int64, equal for positives) and named parts of it for the log."""
        raise NotImplementedError

    def passes(self, config: TrainConfig) -> list[tuple[int, int, int]]:
        """(tokens, width, layers) of each transformer that an image goes through and that learns from it."""
        encoder = self.encoder
        patches = [(view.size // encoder.patch_embed.patch_size[0]) ** 2 for view in self.views(config)]
        return [(n + encoder.num_prefix_tokens, encoder.num_features, len(encoder.blocks)) for n in patches]

    def before_step(self, step: int, steps: int, epoch: float) -> None:
        """Called before every optimizer step, `step` of `steps` and `epoch` epochs being done: what a step needs that
        follows from these (schedules) or from `averages` (a teacher's weights)."""

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        """Called after every optimizer step, `step` of `steps` being done: updates of EMA teachers, clamps."""


class Contrastive(Method):
    """A method with the paper's MLP head on one view or several, and a loss over L2-normalised features."""

    def __init__(self, encoder: Any, config: TrainConfig) -> None:
        super().__init__(encoder, config)
        self.head = projection_head(encoder.num_features, config.head_hidden, config.head_out)

    def forward(self, views: list[Tensor], tokens: Tensor | None) -> Encoded:
        """`view0`, `view1`, ...: features [B, width] of each view."""
        return {f"view{v}": self.encoder(images) for v, images in enumerate(views)}

    def project(self, features: Tensor) -> Tensor:
        """L2-normalised projections [B, head_out], float32."""
        return nn.functional.normalize(self.head(features).float(), dim=1)


def gathered(features: Tensor, ids: Tensor) -> dict[str, Any]:
    """Keyword arguments of a contrastive loss: the batch over all ranks, and where this rank's rows start in it."""
    return {
        "all_features": dist.gather_features(features),
        "all_caption_ids": dist.gather_plain(ids),
        "offset": dist.offset(len(ids)),
    }
