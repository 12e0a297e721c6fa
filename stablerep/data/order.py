"""The order of data: a pure function of (seed, step) over the index, the same at any number of ranks."""

import hashlib
from dataclasses import dataclass

import numpy as np

from stablerep.data.chance import derive, hashes, permute
from stablerep.data.index import Index
from stablerep.runtime.errors import UsageError


@dataclass(frozen=True)
class Rows:
    """Rows of a batch: the image of each, its caption, and its position in the global batch, each int64 [N]."""

    images: np.ndarray
    captions: np.ndarray
    positions: np.ndarray

    def part(self, first: int, last: int) -> "Rows":
        """Rows first .. last - 1."""
        return Rows(self.images[first:last], self.captions[first:last], self.positions[first:last])

    def digest(self) -> str:
        """16 hex digits that tell which images these are, in which order."""
        return hashlib.blake2b(self.images.tobytes(), digest_size=8).hexdigest()


class Order:
    """Global batches of `units_per_batch` units. A unit is a `caption`, of which `rows_per_unit` different images are
    chosen anew each time, or an `image` (one row).

    An epoch is as many units as the sources hold together. Each epoch is a permutation of its own; the rest that fills no
    batch is left out. `weights` say how large a share of an epoch each source has ([]: by size); a source goes through all
    of its units before any comes again. Raises UsageError where the sources do not fit the request.
    """

    def __init__(
        self, seed: int, index: Index, unit: str, rows_per_unit: int, units_per_batch: int, weights: list[float] | None = None
    ) -> None:
        self.seed, self.index, self.unit = seed, index, unit
        self.rows_per_unit, self.units_per_batch = rows_per_unit, units_per_batch
        sources = index.sources
        self._first = np.array([s.first if unit == "caption" else s.first_image for s in sources])
        self._sizes = np.array([s.captions if unit == "caption" else s.images for s in sources])
        self.units = int(self._sizes.sum())
        self._shares = self._share_out(weights or [])
        for source in sources if unit == "caption" else []:
            if source.fewest < rows_per_unit:
                raise UsageError(
                    f"{source.name} holds {source.fewest} images of a caption, {rows_per_unit} are asked for: "
                    "lower --images-per-caption"
                )
        if self.steps_per_epoch < 1:
            raise UsageError(
                f"a batch of {units_per_batch} {unit}s needs more than the {self.units} of the data: lower --global-batch"
            )

    def _share_out(self, weights: list[float]) -> np.ndarray:
        """Units of each source in an epoch, as int64 that add up to `units`."""
        if not weights:
            return self._sizes
        if len(weights) != len(self._sizes) or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
            raise UsageError(f"--data-weights {weights}: one weight >= 0 for each of the {len(self._sizes)} --data, not all 0")
        edges = np.round(np.cumsum(weights) / sum(weights) * self.units).astype(np.int64)
        return np.diff(edges, prepend=0)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return self.units // self.units_per_batch

    def batch(self, step: int) -> Rows:
        """The rows of the global batch of a step (from 0); the rows of a unit lie side by side."""
        units = self._units_of(step)
        if self.unit == "image":
            images = np.repeat(units, self.rows_per_unit)
            return Rows(images, self.index.caption_of(images), np.arange(len(images)))
        first = self.index.first[units]
        counts = self.index.first[units + 1] - first
        keys = hashes(derive("images", self.seed, step), np.arange(len(units)), int(counts.max()))
        keys[np.arange(keys.shape[1]) >= counts[:, None]] = np.iinfo(np.uint64).max
        chosen = np.argsort(keys, axis=1, kind="stable")[:, : self.rows_per_unit]
        images = (first[:, None] + chosen).ravel()
        return Rows(images, np.repeat(units, self.rows_per_unit), np.arange(len(images)))

    def _units_of(self, step: int) -> np.ndarray:
        """The units of a step, as numbers in the index: int64 [units_per_batch]."""
        epoch, k = divmod(step, self.steps_per_epoch)
        places = np.arange(k * self.units_per_batch, (k + 1) * self.units_per_batch)
        places = permute(derive("epoch", self.seed, epoch), places, self.units)
        edges = np.cumsum(self._shares)
        source = np.searchsorted(edges, places, side="right")
        # How many units of its source came before, in all epochs.
        count = places - (edges - self._shares)[source] + epoch * self._shares[source]
        units = np.empty_like(places)
        for s in np.unique(source):
            rounds, at = np.divmod(count[source == s], self._sizes[s])
            for r in np.unique(rounds):
                key = derive("source", self.seed, int(s), int(r))
                units[np.flatnonzero(source == s)[rounds == r]] = permute(key, at[rounds == r], int(self._sizes[s]))
        return units + self._first[source]
