"""SimCLR (arXiv 2002.05709): two crops of one image are positives of each other."""

from torch import Tensor

from stablerep.losses import nt_xent_loss
from stablerep.methods.base import Method
from stablerep.runtime.dist import gather_features, gather_ids, rank


class SimCLR(Method):
    """NT-Xent on two views an image; captions play no part."""

    unit = "image"

    @classmethod
    def views(cls, images_per_caption: int) -> int:
        """Two views an image."""
        return 2

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """NT-Xent loss against the gathered batch."""
        features = self.project(images)
        return nt_xent_loss(
            features, ids, self.temperature,
            all_features=gather_features(features), all_image_ids=gather_ids(ids), offset=rank() * len(ids),
        )  # fmt: skip
