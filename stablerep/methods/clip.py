"""CLIP (arXiv 2103.00020): an image and its caption are positives of each other."""

from typing import Any

import torch
from torch import Tensor

from stablerep.methods.base import Encoded, Method
from stablerep.text import ImageText
from stablerep.train_config import TrainConfig


class CLIP(Method):
    """Image-text contrastive learning on one image a caption."""

    unit = "caption"
    reads_text = True

    def __init__(self, encoder: Any, config: TrainConfig) -> None:
        super().__init__(encoder, config)
        self.image_text = ImageText(encoder.num_features, config.text)

    @classmethod
    def rows_per_unit(cls, images_per_caption: int) -> int:
        """One image a caption, another one each time."""
        return 1

    def forward(self, views: list[Tensor], tokens: Tensor | None) -> Encoded:
        """`view0` [B, width] and `text` [captions, embed]."""
        assert tokens is not None
        return {"view0": self.encoder(views[0]), "text": self.image_text.encode_text(tokens)}

    def loss(self, encoded: Encoded, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Symmetric cross-entropy of images against texts, against the gathered batch."""
        loss = self.image_text.loss(encoded["view0"], encoded["text"], ids)
        return loss, {"logit_scale": self.image_text.logit_scale.detach().exp()}

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        """Keep the logit scale at 100 or less."""
        self.image_text.clamp()
