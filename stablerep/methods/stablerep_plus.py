"""StableRep+ (arXiv 2306.00984, section 3.3): StableRep with language supervision beside it."""

from typing import Any

import torch
from torch import Tensor

from stablerep.losses import multi_positive_loss
from stablerep.methods.base import Contrastive, Encoded, gathered
from stablerep.text import ImageText
from stablerep.train_config import TrainConfig


class StableRepPlus(Contrastive):
    """The multi-positive loss among images, and CLIP's loss between every image and its caption."""

    unit = "caption"
    reads_text = True

    def __init__(self, encoder: Any, config: TrainConfig) -> None:
        super().__init__(encoder, config)
        self.image_text = ImageText(encoder.num_features, config.text)
        self.weights = (config.image_weight, config.text_weight)

    def forward(self, views: list[Tensor], tokens: Tensor | None) -> Encoded:
        """`view0` [B, width] and `text` [captions, embed]."""
        assert tokens is not None
        return {**super().forward(views, None), "text": self.image_text.encode_text(tokens)}

    def loss(self, encoded: Encoded, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """image_weight x multi-positive loss + text_weight x image-text loss, against the gathered batch."""
        features = self.project(encoded["view0"])
        image = multi_positive_loss(features, ids, self.temperature, **gathered(features, ids))
        text = self.image_text.loss(encoded["view0"], encoded["text"], ids)
        parts = {"image_loss": image, "text_loss": text, "logit_scale": self.image_text.logit_scale.exp()}
        return self.weights[0] * image + self.weights[1] * text, {k: v.detach() for k, v in parts.items()}

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        """Keep the logit scale at 100 or less."""
        self.image_text.clamp()
