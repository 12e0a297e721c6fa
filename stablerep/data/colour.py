"""Colour jitter, grey, blur and solarisation of a batch, on the device where it lies. Each operation takes x, float
[B, 3, H, W] in [0, 1], and one parameter a picture [B, 1, 1, 1], and equals the one of torchvision.transforms.v2.functional."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stablerep.data.augment import Draws


def colour(pictures: Tensor, draws: Draws) -> Tensor:
    """Colour jitter, grey, blur, solarisation: uint8 [B, 3, S, S] -> float32 [B, 3, S, S] in [-1, 1], on the same device."""
    x = pictures.to(torch.float32).mul_(1 / 255)
    for turn in range(4):
        for operation, act in enumerate((brightness, contrast, saturation, hue)):
            rows = np.flatnonzero(draws.jitter & (draws.order[:, turn] == operation))
            _apply(x, rows, act, draws.factors[rows, operation])
    _apply(x, np.flatnonzero(draws.grey), lambda part, _: _luma(part).expand_as(part), draws.sigma[draws.grey])
    for radius in np.unique(draws.radius[draws.blur]):
        rows = np.flatnonzero(draws.blur & (draws.radius == radius))
        _apply(x, rows, partial(blur, radius=int(radius)), draws.sigma[rows])
    _apply(x, np.flatnonzero(draws.solarize), lambda part, _: solarize(part), draws.sigma[draws.solarize])
    return x.mul_(2).sub_(1)


def _apply(x: Tensor, rows: np.ndarray, act: Callable[[Tensor, Tensor], Tensor], values: np.ndarray) -> None:
    """x[rows] = act(x[rows], values [N, 1, 1, 1])."""
    if len(rows):
        at = torch.from_numpy(rows).to(x.device)
        x[at] = act(x[at], torch.from_numpy(values.astype(np.float32)).to(x.device).view(-1, 1, 1, 1))


def _luma(x: Tensor) -> Tensor:
    """Grey value [B, 1, H, W]."""
    return (x[:, 0:1] * 0.2989).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:3], alpha=0.114)


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Towards black: factor * x, within [0, 1]."""
    return (x * factor).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Away from the picture's mean grey value."""
    mean = _luma(x.mean((2, 3), keepdim=True))
    return (x * factor).add_((1 - factor) * mean).clamp_(0, 1)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Away from each pixel's grey value."""
    return (x * factor).add_((1 - factor) * _luma(x)).clamp_(0, 1)


def hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue (HSV) by `turn` of a full circle. With V and chroma kept, no branch is needed: the hue is found by
    sorting r, g, b with min and max, and turned back into colour by three triangle waves."""
    r, g, b = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    high, low = torch.maximum(g, b), torch.minimum(g, b)
    swapped = _positive(b - g)
    top = torch.maximum(r, high)
    middle = torch.minimum(r, high)
    chroma = top - torch.minimum(middle, low)
    offset = torch.addcmul(-swapped, _positive(high - r), 2 * swapped - 1 / 3)
    at = ((middle - low) / (6 * chroma).add_(1e-20)).add_(offset).abs_().add_(turn)
    at = (at - at.floor()).mul_(6)
    base = top - chroma
    return torch.cat(
        [
            (at - 3).abs_().sub_(1).clamp_(0, 1).mul_(chroma).add_(base),
            (at - 2).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma).add_(base),
            (at - 4).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma).add_(base),
        ],
        dim=1,
    )


def _positive(x: Tensor) -> Tensor:
    """1 where x > 0, else 0, as float."""
    return (x * 1e30).clamp_(0, 1)


def blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Gaussian blur, one sigma a picture (in pixels), the kernel cut at `radius`; edges are mirrored."""
    count, _, height, width = x.shape
    distance = torch.arange(radius + 1, device=x.device)
    kernel = torch.exp(-0.5 * (distance / sigma.view(-1, 1)) ** 2)
    kernel = kernel / (2 * kernel.sum(1, keepdim=True) - kernel[:, :1])
    padded = functional.pad(x, (radius,) * 4, mode="reflect")
    wide = width + 2 * radius
    # Shifting the flat pictures keeps the inner loops long; what runs over the edges is cut off below.
    flat = padded.view(count, -1)
    for stride in (1, wide):
        length = flat.shape[1] - 2 * radius * stride
        total = flat[:, radius * stride : radius * stride + length] * kernel[:, :1]
        for d in range(1, radius + 1):
            before, after = (radius - d) * stride, (radius + d) * stride
            total.addcmul_(flat[:, before : before + length] + flat[:, after : after + length], kernel[:, d : d + 1])
        flat = total
    whole = functional.pad(flat, (0, padded.numel() // count - flat.shape[1])).view(padded.shape)
    return whole[:, :, :height, :width]


def solarize(x: Tensor) -> Tensor:
    """Invert what is lighter than the middle: x, or 1 - x where x >= 1/2."""
    return torch.where(x < 0.5, x, 1 - x)
