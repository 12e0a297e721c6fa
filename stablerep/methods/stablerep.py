"""StableRep (arXiv 2306.00984): the images of one caption are positives of each other, each cropped once."""

from torch import Tensor

from stablerep.losses import multi_positive_loss
from stablerep.methods.base import Method
from stablerep.runtime.dist import gather_features, gather_ids, rank


class StableRep(Method):
    """Multi-positive contrastive learning; the rows of a caption share its id."""

    unit = "caption"

    @classmethod
    def views(cls, images_per_caption: int) -> int:
        """A caption fills as many rows as it has images."""
        return images_per_caption

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """Multi-positive loss against the gathered batch."""
        features = self.project(images)
        return multi_positive_loss(
            features, ids, self.temperature,
            all_features=gather_features(features), all_caption_ids=gather_ids(ids), offset=rank() * len(ids),
        )  # fmt: skip
