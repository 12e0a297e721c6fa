"""What the training loop wants of a method: a sampling unit, views of it, and a loss."""

from typing import Any, ClassVar

from torch import Tensor, nn

from stablerep.heads import projection_head


class Method(nn.Module):
    """An encoder with its head. `unit` is what an epoch counts (`caption` or `image`)."""

    unit: ClassVar[str]

    def __init__(self, encoder: Any, head_hidden: int, head_out: int, temperature: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = projection_head(encoder.num_features, head_hidden, head_out)
        self.temperature = temperature

    @classmethod
    def views(cls, images_per_caption: int) -> int:
        """Rows of the batch that one unit fills."""
        raise NotImplementedError

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """Loss of this rank's rows: images [B, 3, H, W], ids [B] int64 (equal for positives)."""
        raise NotImplementedError

    def project(self, images: Tensor) -> Tensor:
        """L2-normalised projections [B, head_out], float32."""
        features: Tensor = self.head(self.encoder(images)).float()
        return nn.functional.normalize(features, dim=1)
