"""Projection head: the paper's 3-layer MLP, with batch statistics over all ranks (nn.SyncBatchNorm needs a GPU)."""

import torch
from torch import Tensor, nn

from stablerep.runtime.dist import sum_over_ranks


class GatheredBatchNorm(nn.Module):
    """BatchNorm (arXiv 1502.03167) of [B, D] over the batches of all ranks, in float32, without running statistics:
    the head is thrown away after training."""

    def __init__(self, width: int, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        sums = sum_over_ranks(torch.cat([y.sum(0), y.square().sum(0), y.new_tensor([float(len(y))])]))
        total, squares, count = sums[:-1].chunk(2)[0], sums[:-1].chunk(2)[1], sums[-1]
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        y = (y - mean) * torch.rsqrt(variance + 1e-5)
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
