"""Losses, in float32; the contrastive ones over the rows of this rank against the gathered batch."""

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


def byol_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """BYOL's regression of one view (arXiv 2006.07733, equation 2): the mean over rows of 2 - 2 cos(p_i, z_i), a scalar.

    predictions: [B, D], the student's; targets: [B, D], the teacher's for the other view, without gradient. Neither needs
    to be normalised.
    """
    return 2 - 2 * torch.nn.functional.cosine_similarity(predictions.float(), targets.float(), dim=1).mean()


def mocov3_loss(
    queries: Tensor, keys: Tensor, temperature: float, *, all_keys: Tensor | None = None, offset: int = 0
) -> Tensor:
    """MoCo v3's contrastive loss of one view's queries (arXiv 2104.02057, equation 1 and algorithm 1), a scalar.

    queries: [B, D], the student's, and keys: [B, D], the teacher's for the other view, without gradient; both
    L2-normalised. all_keys: the gathered batch [N, D], in which this rank's rows start at `offset`.

    2 t * mean over rows of -log softmax_k(q_i.k / t)[k_i], over all N keys.
    """
    logits = queries.float() @ (keys if all_keys is None else all_keys).float().T / temperature
    own = torch.arange(len(queries), device=queries.device) + offset
    return 2 * temperature * torch.nn.functional.cross_entropy(logits, own)


def dino_loss(
    student: Tensor, teacher: Tensor, centre: Tensor, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """DINO's cross-entropy between views (arXiv 2104.14294, equations 1 to 3), a scalar.

    student: [V, B, K], outputs for all V views of B images; teacher: [G, B, K], without gradient, for the first G of them;
    centre: [K]. The mean over images, and over pairs of a teacher's view t and another student's view s, of
    -sum_k softmax((teacher_t - centre) / teacher_temperature)_k log softmax(student_s / student_temperature)_k.
    """
    log_p = torch.log_softmax(student.float() / student_temperature, dim=2)
    p = torch.softmax((teacher.float() - centre) / teacher_temperature, dim=2)
    pairs = -torch.einsum("tbk,sbk->ts", p, log_p) / student.shape[1]
    return pairs[~torch.eye(*pairs.shape, dtype=torch.bool, device=pairs.device)].mean()


def _matching(logits: Tensor, ids: Tensor, every_id: Tensor) -> Tensor:
    """Mean cross-entropy of rows against the uniform distribution over the columns with their id."""
    positive = ids[:, None] == every_id[None, :]
    log_p = torch.log_softmax(logits, dim=1)
    return -((log_p * positive).sum(1) / positive.sum(1).clamp(min=1)).mean()


def mae_loss(prediction: Tensor, target: Tensor, mask: Tensor, *, per_row: bool = False) -> Tensor:
    """MAE's reconstruction error (arXiv 2111.06377, section 3), a scalar; [B], the error of each row, with `per_row`.

    prediction, target: [B, N, P], P values of each of N patches. mask: [B, N], 1 (or True) where the encoder did not see the
    patch. The mean squared error of a patch, averaged over all masked patches (of a row).
    """
    error = (prediction.float() - target.float()).square().mean(2) * mask
    return error.sum(1) / mask.sum(1) if per_row else error.sum() / mask.sum()
