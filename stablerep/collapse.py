"""Has the encoder collapsed? Two numbers a batch, for methods that nothing but their training dynamics keeps from it."""

import torch
from torch import Tensor

from stablerep.runtime.dist import gathering, sum_over_ranks


@torch.no_grad()
def collapse(features: Tensor) -> dict[str, Tensor]:
    """Spread and rank of L2-normalised features [B, D] over the batches of all ranks. Collective.

    `feature_std`: standard deviation of a coordinate, averaged over coordinates, times sqrt(D): about 0 where all rows are
    alike, about 1 where directions are uniform (Chen and He, arXiv 2011.10566, section 4.1). `effective_rank`: the
    exponential of the entropy of the singular values' shares (Roy and Vetterli 2007, equation 4), from 1 to min(B, D).

    Ranks share D x D sums instead of their rows; these are float64, for their eigenvalues are the squares of what is asked.
    """
    rows, width = len(features) * gathering(), features.shape[1]
    x = torch.nn.functional.normalize(features.double(), dim=1)
    mean, products = sum_over_ranks(x.sum(0)) / rows, sum_over_ranks(x.T @ x)
    spread = (products.diagonal() / rows - mean.square()).clamp(min=0).sqrt().mean() * width**0.5
    share = torch.linalg.eigvalsh(products).clamp(min=0).sqrt()
    share = share / share.sum()
    return {"feature_std": spread, "effective_rank": torch.special.entr(share).sum().exp()}
