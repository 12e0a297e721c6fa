"""The order of data: a pure function of (seed, step) over the frozen index, the same at any number of ranks."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


def derive(*words: object) -> int:
    """A 63-bit seed from any words, stable over Python versions and processes."""
    return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=8).digest(), "big") >> 1


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of the units in an epoch."""
    return np.random.default_rng(derive("epoch", seed, epoch)).permutation(size)


@dataclass(frozen=True)
class Row:
    """One row of a global batch: which image, and the position in the batch (that seeds its crop)."""

    step: int
    position: int
    caption: int
    image: int
    unit: int  # rows with equal units are positives


@dataclass(frozen=True)
class Order:
    """Batches of `units_per_batch` units (captions, or images), each filling `views` rows."""

    seed: int
    captions: int
    stored: int  # images that the dataset holds a caption
    unit: str
    views: int
    units_per_batch: int

    @property
    def units(self) -> int:
        """Number of units in an epoch."""
        return self.captions if self.unit == "caption" else self.captions * self.stored

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch; the rest of a permutation is left out."""
        return self.units // self.units_per_batch

    def batch(self, step: int) -> list[Row]:
        """The rows of the global batch of a step (from 0)."""
        epoch, k = divmod(step, self.steps_per_epoch)
        chosen = permutation(self.seed, epoch, self.units)[k * self.units_per_batch : (k + 1) * self.units_per_batch]
        rows: list[Row] = []
        for unit in map(int, chosen):
            if self.unit == "caption":
                random = np.random.default_rng(derive("images", self.seed, step, unit))
                pairs = [(unit, int(j)) for j in random.permutation(self.stored)[: self.views]]
            else:
                pairs = [divmod(unit, self.stored)] * self.views
            rows += [Row(step, len(rows) + v, caption, j, unit) for v, (caption, j) in enumerate(pairs)]
        return rows
