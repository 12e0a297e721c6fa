"""The loader: decode and crop this rank's rows of each global batch, in worker processes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stablerep.data.augment import crop
from stablerep.data.order import Order, Row, derive
from stablerep.data.shards import DatasetIndex
from stablerep.runtime.errors import WorkError
from stablerep.runtime.stop import blocked, ignore


class Rows(Dataset[tuple[Tensor, int]]):
    """Rows of batches as cropped pictures; the crop is a pure function of (seed, step, position)."""

    def __init__(self, index: DatasetIndex, seed: int, size: int, scale_min: float) -> None:
        self.index, self.seed, self.size, self.scale_min = index, seed, size, scale_min

    def __getitem__(self, row: Row) -> tuple[Tensor, int]:  # type: ignore[override]
        import simplejpeg

        data = self.index.read(row.caption, row.image)
        try:
            picture = simplejpeg.decode_jpeg(data)
        except ValueError as error:
            name = f"{self.index.ids[row.caption]}.{row.image}.jpg"
            raise WorkError(f"{name} is not a JPEG ({error}): run generation/audit.py --repair on its run") from None
        random = np.random.default_rng(derive("crop", self.seed, row.step, row.position))
        return crop(picture, self.size, self.scale_min, random), row.unit


def rank_rows(order: Order, step: int, rank: int, world: int) -> list[Row]:
    """This rank's contiguous part of a global batch."""
    rows = order.batch(step)
    each = len(rows) // world
    return rows[rank * each : (rank + 1) * each]


def batches(rows: Rows, order: Order, first: int, last: int, rank: int, world: int, workers: int) -> Iterator[Any]:
    """Yield (pictures uint8 [B, 3, S, S], units int64 [B]) for steps first .. last - 1."""
    loader = DataLoader(
        rows,
        batch_sampler=_Sampler(order, first, last, rank, world),  # type: ignore[arg-type]
        num_workers=workers,
        worker_init_fn=_quiet,
        pin_memory=torch.cuda.is_available(),
    )
    with blocked():
        iterator = iter(loader)
    yield from iterator


class _Sampler:
    """Lists of rows, made as they are needed."""

    def __init__(self, order: Order, first: int, last: int, rank: int, world: int) -> None:
        self.order, self.first, self.last, self.rank, self.world = order, first, last, rank, world

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[Row]]:
        for step in range(self.first, self.last):
            yield rank_rows(self.order, step, self.rank, self.world)


def _quiet(worker: int) -> None:
    ignore()
    torch.set_num_threads(1)
