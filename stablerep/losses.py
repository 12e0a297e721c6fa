"""Contrastive losses, in float32, over the rows of this rank against the gathered batch."""

import torch
from torch import Tensor


def multi_positive_loss(
    features: Tensor,
    caption_ids: Tensor,
    temperature: float,
    *,
    all_features: Tensor | None = None,
    all_caption_ids: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """StableRep's multi-positive contrastive loss (arXiv 2306.00984, equations 1 and 2), a scalar.

    features: [B, D], L2-normalised. caption_ids: [B] int64; rows with the same id are positives of each other, whatever
    their place, so that a caption drawn twice is no false negative. all_*: the gathered batch ([N, D], [N]), in which
    this rank's rows start at `offset`; its gradient must sum over ranks (`runtime.dist.gather_features`).

    For row i with positives P(i) (itself excluded): -1/|P(i)| * sum over p in P(i) of log softmax_k(f_i.f_k / t)[p],
    k != i; averaged over the B rows. A row without a positive contributes 0, not NaN.
    """
    everything = features if all_features is None else all_features
    every_id = caption_ids if all_caption_ids is None else all_caption_ids
    logits = features.float() @ everything.float().T / temperature
    own = torch.arange(len(features), device=features.device)
    itself = torch.zeros_like(logits, dtype=torch.bool)
    itself[own, own + offset] = True
    logits = logits.masked_fill(itself, -1e9)
    positive = (caption_ids[:, None] == every_id[None, :]) & ~itself
    log_p = torch.log_softmax(logits, dim=1)
    per_row = -(log_p * positive).sum(1) / positive.sum(1).clamp(min=1)
    return per_row.mean()


def nt_xent_loss(
    features: Tensor,
    image_ids: Tensor,
    temperature: float,
    *,
    all_features: Tensor | None = None,
    all_image_ids: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """SimCLR's NT-Xent (arXiv 2002.05709, equation 1): the multi-positive loss with the two views of an image as the
    only positives. Shapes as in `multi_positive_loss`; `image_ids` are equal for two views of one image."""
    return multi_positive_loss(
        features, image_ids, temperature, all_features=all_features, all_caption_ids=all_image_ids, offset=offset
    )


def clip_loss(
    images: Tensor,
    texts: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    scale: Tensor | float,
    *,
    all_images: Tensor | None = None,
    all_texts: Tensor | None = None,
    all_image_ids: Tensor | None = None,
    all_text_ids: Tensor | None = None,
) -> Tensor:
    """CLIP's symmetric loss (arXiv 2103.00020, figure 3) with every pair of equal ids a positive, a scalar.

    images: [B, D] and texts: [C, D], L2-normalised; image_ids: [B], text_ids: [C] int64. all_*: the gathered batch. Each
    image's cross-entropy is against its captions (uniform over those with its id), each caption's against its images;
    the mean of the two directions. With one image a caption and no repeated caption this is CLIP's own loss.
    """
    every_image = images if all_images is None else all_images
    every_text = texts if all_texts is None else all_texts
    every_image_id = image_ids if all_image_ids is None else all_image_ids
    every_text_id = text_ids if all_text_ids is None else all_text_ids
    to_text = _matching(scale * images.float() @ every_text.float().T, image_ids, every_text_id)
    to_image = _matching(scale * texts.float() @ every_image.float().T, text_ids, every_image_id)
    return (to_text + to_image) / 2


def _matching(logits: Tensor, ids: Tensor, every_id: Tensor) -> Tensor:
    """Mean cross-entropy of rows against the uniform distribution over the columns with their id."""
    positive = ids[:, None] == every_id[None, :]
    log_p = torch.log_softmax(logits, dim=1)
    return -((log_p * positive).sum(1) / positive.sum(1).clamp(min=1)).mean()
