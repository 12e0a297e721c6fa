"""The batches of one rank: rows in order, read and cropped by worker processes, coloured on the device."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stablerep.data import colour, colour_cpu
from stablerep.data.augment import Draws, View, draw
from stablerep.data.chance import derive, orders
from stablerep.data.index import Index
from stablerep.data.order import Order, Rows
from stablerep.data.workers import Filled, Slots, Workers
from stablerep.runtime.errors import WorkError

AHEAD = 3  # batches in the making
ENOUGH = 500  # images read before `max_broken` is judged
NAMED = 5  # broken images that the error names


@dataclass
class Batch:
    """This rank's rows of a global batch. `views`: one float32 [B, 3, size, size] in [-1, 1] a view, then one int64 [B, n]
    a shuffle: an order of 0 .. n - 1 for each row; `ids` int64 [B], equal for positives; `texts`: the caption of each row;
    `digest` tells the images of the *global* batch; `replaced` counts rows whose image was broken."""

    step: int
    views: list[Tensor]
    ids: Tensor
    texts: list[str]
    digest: str
    replaced: int


def rank_rows(rows: Rows, rank: int, world: int) -> Rows:
    """A rank's contiguous part of a global batch; world divides its size."""
    each = len(rows.images) // world
    return rows.part(rank * each, (rank + 1) * each)


def batches(
    index: Index,
    order: Order,
    views: list[View],
    *,
    seed: int,
    first: int,
    last: int,
    rank: int,
    world: int,
    workers: int,
    device: torch.device,
    max_broken: float,
    on_broken: Callable[[str, str], None],
    texts: bool = True,
    shuffles: Sequence[int] = (),
) -> Iterator[Batch]:
    """Yield the batches of steps first .. last - 1. Call it, and close it, in the main thread.

    `on_broken(name, why)` hears of each broken image that was replaced, and of each worker that died and was. `texts`:
    read the captions too (one more read a row). `shuffles`: lengths of the random orders that each row gets. Raises
    WorkError where more than the share `max_broken` of the images read is broken, and where a worker cannot go on.
    """
    if first >= last:
        return
    tally = _Tally(index, max_broken, on_broken)
    planned = {step: order.batch(step) for step in range(first, min(first + AHEAD, last))}
    each = len(planned[first].images) // world
    slots = Slots(AHEAD, each, views)
    with Workers(min(max(1, workers), each), slots, index, views, seed, texts) as pool, _pinned(slots, device):
        for step, rows in planned.items():
            pool.send(step, step % AHEAD, rank_rows(rows, rank, world))
        for step in range(first, last):
            parts = pool.receive()
            while pool.deaths:
                on_broken("loader", pool.deaths.pop(0) + "; it was started again")
            rows = planned.pop(step)
            positions = rank_rows(rows, rank, world).positions
            pictures = [torch.from_numpy(v).to(device, copy=True) for v in slots.views[step % AHEAD]]
            if step + AHEAD < last:
                planned[step + AHEAD] = order.batch(step + AHEAD)
                pool.send(step + AHEAD, step % AHEAD, rank_rows(planned[step + AHEAD], rank, world))
            coloured = [
                _colour(p, draw(v, seed, step, n, positions)) for n, (v, p) in enumerate(zip(views, pictures, strict=True))
            ]
            shuffled = [
                torch.from_numpy(orders(derive("shuffle", seed, step, n), positions, count)).to(device)
                for n, count in enumerate(shuffles)
            ]
            yield Batch(
                step=step,
                views=coloured + shuffled,
                ids=_ids(index, order, parts).to(device),
                texts=[text for part in parts for text in part.texts],
                digest=rows.digest(),
                replaced=tally.add(parts, rank_rows(rows, rank, world)),
            )


def blank(rows: int, views: list[View], shuffles: Sequence[int] = ()) -> list[Tensor]:
    """What `Batch.views` looks like, with nothing in it."""
    pictures = [torch.zeros(rows, 3, view.size, view.size) for view in views]
    return pictures + [torch.arange(count).repeat(rows, 1) for count in shuffles]


def _colour(pictures: Tensor, draws: Draws) -> Tensor:
    if pictures.device.type == "cpu":
        return torch.from_numpy(colour_cpu.colour(pictures.numpy(), draws))
    return colour.colour(pictures, draws)


def _ids(index: Index, order: Order, parts: list[Filled]) -> Tensor:
    """What tells positives: the number of the image, or the id of the caption's text."""
    if order.unit == "image":
        return torch.tensor([i for part in parts for i in part.images])
    return torch.from_numpy(index.captions["id"][[c for part in parts for c in part.captions]])


@contextmanager
def _pinned(slots: Slots, device: torch.device) -> Iterator[None]:
    """Let the GPU fetch batches from the shared memory directly."""
    if device.type != "cuda":
        yield
        return
    cuda, address = torch.cuda.cudart(), slots.memory.ctypes.data
    torch.cuda.check_error(cuda.cudaHostRegister(address, slots.memory.nbytes, 0))
    try:
        yield
    finally:
        cuda.cudaHostUnregister(address)


class _Tally:
    """Counts broken images, tells of them, and stops the run where there are too many."""

    def __init__(self, index: Index, limit: float, tell: Callable[[str, str], None]) -> None:
        self._index, self._limit, self._tell = index, limit, tell
        self._read = self._broken = 0
        self._names: list[str] = []

    def add(self, parts: list[Filled], rows: Rows) -> int:
        """Count a batch; the number of rows that were replaced. Raises WorkError."""
        for image, why in [b for part in parts for b in part.broken]:
            name = self._index.name(image)
            self._tell(name, why)
            self._broken += 1
            self._names += [name] if len(self._names) < NAMED else []
        self._read += len(rows.images)
        if self._read >= ENOUGH and self._broken > self._limit * self._read:
            raise WorkError(
                f"{self._broken} of {self._read} images read are broken, more than --max-broken {self._limit:g} allows: "
                + ", ".join(self._names)
            )
        used = np.array([i for part in parts for i in part.images])
        return int((used != rows.images).sum())
