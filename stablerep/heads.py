"""Projection head: the paper's 3-layer MLP, with batch statistics over all ranks (nn.SyncBatchNorm needs a GPU)."""

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


def projection_head(width: int, hidden: int, out: int) -> nn.Sequential:
    """width -> hidden -> hidden -> out, BatchNorm after each layer, the last one without affine (StableRep, section 3.2)."""
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False),
        GatheredBatchNorm(hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden, bias=False),
        GatheredBatchNorm(hidden),
        nn.ReLU(),
        nn.Linear(hidden, out, bias=False),
        GatheredBatchNorm(out, affine=False),
    )
