"""SimCLR (arXiv 2002.05709): two crops of one image are positives of each other."""

import torch
from torch import Tensor

from stablerep.data.augment import View
from stablerep.losses import nt_xent_loss
from stablerep.methods.base import Contrastive, Encoded
from stablerep.runtime import dist
from stablerep.train_config import TrainConfig


class SimCLR(Contrastive):
    """NT-Xent on two views an image; captions play no part."""

    unit = "image"

    @classmethod
    def views(cls, config: TrainConfig) -> list[View]:
        """Two views an image."""
        return super().views(config) * 2

    def loss(self, encoded: Encoded, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Equation 1 of the paper, against the gathered batch. Each row of the batch is an image of its own, so its
        place says which two views belong together."""
        rows = len(ids)
        place = torch.arange(rows, device=ids.device) + dist.offset(rows)
        features, places = self.project(torch.cat([encoded["view0"], encoded["view1"]])), place.repeat(2)
        every, every_place = dist.gather_features(features), dist.gather_plain(places)
        return nt_xent_loss(
            features, places, self.temperature,
            all_features=every, all_image_ids=every_place, offset=dist.offset(2 * rows),
        ), {}  # fmt: skip
