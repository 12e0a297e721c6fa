"""StableRep (arXiv 2306.00984): the images of one caption are positives of each other, each cropped once."""

from torch import Tensor

from stablerep.losses import multi_positive_loss
from stablerep.methods.base import Contrastive, Encoded, gathered


class StableRep(Contrastive):
    """Multi-positive contrastive learning; the rows of a caption share its id."""

    unit = "caption"

    def loss(self, encoded: Encoded, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Equations 1 and 2 of the paper, against the gathered batch."""
        features = self.project(encoded["view0"])
        return multi_positive_loss(features, ids, self.temperature, **gathered(features, ids)), {}
