"""Augmentations: random-resized crop and flip of one image on the CPU; colour and blur of a batch on the device.

The parameters of a step are drawn for the whole global batch and cut to a rank's rows, so that they do not depend on
the number of ranks. Values: StableRep's official recipe (jitter 0.4/0.4/0.4/0.1 at p 0.8, grey 0.2, blur 0.5, flip,
down-sampling at p 0.05). Jitter acts in a fixed order (brightness, contrast, saturation, hue), not a random one.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stablerep.data.order import derive

GREY = (0.299, 0.587, 0.114)


def crop(picture: np.ndarray, size: int, scale_min: float, random: np.random.Generator) -> Tensor:
    """Random-resized crop (area scale_min..1, aspect 3/4..4/3) and flip: uint8 [H, W, 3] -> uint8 [3, size, size]."""
    height, width = picture.shape[:2]
    h, w = height, width
    for _ in range(10):
        area = height * width * random.uniform(scale_min, 1.0)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        h = w = min(height, width)
    top, left = int(random.integers(height - h + 1)), int(random.integers(width - w + 1))
    part = torch.from_numpy(picture[top : top + h, left : left + w].copy()).permute(2, 0, 1)[None].float()
    part = functional.interpolate(part, (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
    if random.random() < 0.5:
        part = part.flip(-1)
    return part.round().clamp(0, 255).to(torch.uint8)


@dataclass
class Draws:
    """Random parameters of a global batch, each [N]."""

    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    grey: Tensor
    sigma: Tensor
    blur: Tensor
    small: Tensor


def draw(seed: int, step: int, count: int) -> Draws:
    """The parameters of a step: a pure function of its arguments."""
    g = torch.Generator().manual_seed(derive("colour", seed, step))

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=g) * (high - low) + low

    jitter = (torch.rand(count, generator=g) < 0.8).float()
    return Draws(
        brightness=1 + jitter * uniform(-0.4, 0.4),
        contrast=1 + jitter * uniform(-0.4, 0.4),
        saturation=1 + jitter * uniform(-0.4, 0.4),
        hue=jitter * uniform(-0.1, 0.1),
        grey=torch.rand(count, generator=g) < 0.2,
        sigma=uniform(0.1, 2.0),
        blur=torch.rand(count, generator=g) < 0.5,
        small=torch.where(torch.rand(count, generator=g) < 0.05, torch.where(torch.rand(count, generator=g) < 0.5, 64, 128), 0),
    )


def augment(pictures: Tensor, draws: Draws, first: int) -> Tensor:
    """Colour, grey, blur, down-sampling of rows first.. of the global batch: uint8 [B, 3, H, W] -> float in [-1, 1]."""
    count, size = len(pictures), pictures.shape[-1]

    def own(values: Tensor) -> Tensor:
        return values[first : first + count].to(pictures.device).view(-1, 1, 1, 1)

    x = pictures.float() / 255
    weights = torch.tensor(GREY, device=x.device).view(1, 3, 1, 1)
    x = (x * own(draws.brightness)).clamp(0, 1)
    mean = (x * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    x = (mean + (x - mean) * own(draws.contrast)).clamp(0, 1)
    luma = (x * weights).sum(1, keepdim=True)
    x = (luma + (x - luma) * own(draws.saturation)).clamp(0, 1)
    x = _rotate_hue(x, draws.hue[first : first + count].to(x.device)).clamp(0, 1)
    x = torch.where(own(draws.grey), (x * weights).sum(1, keepdim=True).expand_as(x), x)
    # The paper's blur is meant for 224 px; the width shrinks with the picture.
    x = torch.where(own(draws.blur), _blur(x, draws.sigma[first : first + count].to(x.device) * size / 224), x)
    for pixels in (64, 128):
        if pixels < size:
            low = functional.interpolate(x, (pixels, pixels), mode="bilinear", antialias=True, align_corners=False)
            low = functional.interpolate(low, (size, size), mode="bilinear", align_corners=False)
            x = torch.where(own(draws.small) == pixels, low, x)
    return x * 2 - 1


def _rotate_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate colours about the grey axis by `turn` [B] of a full circle (in YIQ)."""
    to = torch.tensor([GREY, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)], device=x.device)
    c, s = torch.cos(2 * math.pi * turn), torch.sin(2 * math.pi * turn)
    turned = torch.zeros(len(x), 3, 3, device=x.device)
    turned[:, 0, 0] = 1
    turned[:, 1, 1], turned[:, 1, 2], turned[:, 2, 1], turned[:, 2, 2] = c, -s, s, c
    return torch.einsum("bij,bjhw->bihw", torch.linalg.inv(to) @ turned @ to, x)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Separable Gaussian blur with one sigma a picture, in pixels."""
    radius = max(1, math.ceil(x.shape[-1] * 2 * 2 / 224))
    at = torch.arange(-radius, radius + 1, device=x.device).float()
    kernel = torch.exp(-0.5 * (at[None] / sigma.clamp(min=1e-3)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None]
    flat = x.reshape(1, -1, *x.shape[2:])
    flat = functional.pad(flat, (radius,) * 4, mode="reflect")
    flat = functional.conv2d(flat, kernel[:, :, None, :], groups=flat.shape[1])
    flat = functional.conv2d(flat, kernel[:, :, :, None], groups=flat.shape[1])
    return flat.reshape(x.shape)
