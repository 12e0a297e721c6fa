"""MoCo v3 (arXiv 2104.02057) for ViTs: contrast with an EMA teacher's keys of the batch; there is no queue."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from stablerep.arch import sincos_positions
from stablerep.heads import mlp_head, projection_head
from stablerep.losses import mocov3_loss
from stablerep.methods.base import Encoded
from stablerep.methods.teacher import WithTeacher
from stablerep.runtime import dist
from stablerep.runtime.errors import UsageError
from stablerep.train_config import TrainConfig


class MoCoV3(WithTeacher):
    """Projector of three layers and predictor of two (section 3); patch projection and positions are not trained."""

    default_momentum = 0.99
    default_temperature = 0.2

    def __init__(self, encoder: Any, config: TrainConfig) -> None:
        freeze_patches(encoder)
        hidden, out = config.head_hidden, config.head_out
        super().__init__(encoder, config, projection_head(encoder.num_features, hidden, out))
        self.predictor = mlp_head(out, hidden, out)

    def loss(self, encoded: Encoded, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Algorithm 1 of the paper, each view's queries against the other's keys of the gathered batch."""
        queries = [normalize(self.predictor(self.head(encoded[f"view{v}"])).float(), dim=1) for v in range(2)]
        keys = [normalize(k.float(), dim=1) for k in self.targets(encoded)]
        first, second = (
            mocov3_loss(q, k, self.temperature, all_keys=dist.gather_plain(k), offset=dist.offset(len(k)))
            for q, k in zip(queries, reversed(keys), strict=True)
        )
        return first + second, {}


@torch.no_grad()
def freeze_patches(encoder: Any) -> None:
    """Random patch projection and sine-cosine positions, neither of which is trained: what keeps ViTs stable (sections 4
    and 5 of the paper; initialisation of the official code). Raises UsageError on a ViT that is built otherwise."""
    patches, positions = encoder.patch_embed, encoder.pos_embed
    height, width = patches.grid_size
    if positions is None or positions.shape[1] != 1 + height * width or positions.shape[2] % 4:
        raise UsageError("--method mocov3 needs a ViT with a CLS token, absolute positions and a width that 4 divides")
    encoder.init_weights("moco")  # timm's copy of the official code's
    positions[0] = sincos_positions(height, width, positions.shape[2])
    nn.init.xavier_uniform_(patches.proj.weight.flatten(1))  # a view: fills the weight itself
    for p in (positions, *patches.proj.parameters()):
        p.requires_grad_(False)
