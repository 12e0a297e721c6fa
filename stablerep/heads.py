"""Projection heads: MLPs with batch statistics over all ranks (nn.SyncBatchNorm needs a GPU)."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from stablerep.runtime.dist import gathering, sum_over_ranks


class GatheredBatchNorm(nn.Module):
    """BatchNorm (arXiv 1502.03167) of [B, D] over the batches of all ranks, in float32, without running statistics:
    the head is thrown away after training."""

    def __init__(self, width: int, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        count = len(y) * gathering()  # every rank holds as many rows
        y = y - sum_over_ranks(y.sum(0)) / count
        # From the centred values: E[y^2] - E[y]^2 would leave only rounding where a feature hardly varies.
        variance = sum_over_ranks(y.square().sum(0)) / count
        y = y * torch.rsqrt(variance + 1e-5)
        if self.weight is not None and self.bias is not None:
            y = y * self.weight.float() + self.bias.float()
        return y.to(x.dtype)


def mlp_head(*widths: int, last_norm: bool = True) -> nn.Sequential:
    """Linear layers from each width to the next, BatchNorm and ReLU between them. At the end a BatchNorm without affine,
    or, with `last_norm=False`, the bias of the last layer."""
    layers: list[nn.Module] = []
    for width, out in pairwise(widths[:-1]):
        layers += [nn.Linear(width, out, bias=False), GatheredBatchNorm(out), nn.ReLU()]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=not last_norm))
    return nn.Sequential(*layers, *([GatheredBatchNorm(widths[-1], affine=False)] if last_norm else []))


def projection_head(width: int, hidden: int, out: int) -> nn.Sequential:
    """width -> hidden -> hidden -> out, BatchNorm after each layer, the last one without affine (StableRep, section 3.2)."""
    return mlp_head(width, hidden, hidden, out)
