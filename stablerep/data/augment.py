"""Augmentations of StableRep's official recipe: down-sampling, random-resized crop, colour jitter, grey, blur, flip; and
BYOL's solarisation (arXiv 2006.07733, appendix B), after the blur.

What needs the whole picture (down-sampling, crop, flip) is done by the CPU (`crop.py`); the rest on the device where the
batch is (`colour.py`), or picture by picture where that is the CPU (`colour_cpu.py`). Each operation is torchvision's, to
rounding; all parameters are a pure function of (seed, step, view, position in the global batch).
"""

from dataclasses import dataclass

import numpy as np

from stablerep.data.chance import derive, uniforms


@dataclass(frozen=True)
class View:
    """One augmented view of each row; defaults are the paper's. Blur widths are meant for 224 px and scale with `size`."""

    size: int
    crop_min: float = 0.08
    crop_max: float = 1.0
    downsample_p: float = 0.05
    flip_p: float = 0.5
    jitter_p: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grey_p: float = 0.2
    blur_p: float = 0.5
    blur_min: float = 0.1
    blur_max: float = 2.0
    solarize_p: float = 0.0


@dataclass(frozen=True)
class Draws:
    """Random parameters of rows. `factors` [N, 4] of brightness, contrast, saturation, hue; `order` [N, 4] in which they
    act; `jitter`, `grey`, `blur`, `solarize` [N] bool: whether they do; `sigma` [N] of the blur in pixels."""

    jitter: np.ndarray
    order: np.ndarray
    factors: np.ndarray
    grey: np.ndarray
    blur: np.ndarray
    sigma: np.ndarray
    solarize: np.ndarray

    @property
    def radius(self) -> np.ndarray:
        """Where the kernel of the blur ends: int [N], in pixels."""
        return np.ceil(3 * self.sigma).astype(int)


def draw(view: View, seed: int, step: int, number: int, positions: np.ndarray) -> Draws:
    """The colour parameters of rows at `positions` [N] of the global batch of a step, for view `number` of the method."""
    u = uniforms(derive("colour", seed, step, number), positions, 12)
    inverted = uniforms(derive("solarize", seed, step, number), positions, 1)[:, 0]  # a key of its own: most views have none
    wide = np.array([view.brightness, view.contrast, view.saturation, view.hue])
    return Draws(
        jitter=u[:, 0] < view.jitter_p,
        order=np.argsort(u[:, 1:5], axis=1),
        factors=np.array([1.0, 1.0, 1.0, 0.0]) + (2 * u[:, 5:9] - 1) * wide,
        grey=u[:, 9] < view.grey_p,
        blur=u[:, 10] < view.blur_p,
        sigma=(view.blur_min + u[:, 11] * (view.blur_max - view.blur_min)) * view.size / 224,
        solarize=inverted < view.solarize_p,
    )
