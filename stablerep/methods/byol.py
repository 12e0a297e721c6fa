"""BYOL (arXiv 2006.07733): predict what an EMA teacher says of the other view; there are no negatives."""

from typing import Any

from torch import Tensor

from stablerep.heads import mlp_head
from stablerep.losses import byol_loss
from stablerep.methods.base import Encoded
from stablerep.methods.teacher import WithTeacher
from stablerep.train_config import TrainConfig


class BYOL(WithTeacher):
    """Projector and predictor of two layers each (section 3.3); the teacher has a projector only."""

    default_momentum = 0.996

    def __init__(self, encoder: Any, config: TrainConfig) -> None:
        hidden, out = config.head_hidden, config.head_out
        super().__init__(encoder, config, mlp_head(encoder.num_features, hidden, out, last_norm=False))
        self.predictor = mlp_head(out, hidden, out, last_norm=False)

    def loss(self, encoded: Encoded, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Equation 2 of the paper, each view predicting the other."""
        first, second = (self.predictor(self.head(encoded[f"view{v}"])) for v in range(2))
        of_first, of_second = self.targets(encoded)
        return byol_loss(first, of_second) + byol_loss(second, of_first), self.health(encoded)
