"""Process group: start, gather with the right gradient, agree, finish. One rank works without a group's help too."""

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor

_alone = False  # inside `alone()`


def start(store: Any, rank: int, world: int, *, local_rank: int, gpus: int, timeout_s: float = 1800.0) -> None:
    """Join the process group through `store`; sets what DeepSpeed reads from the environment."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local_rank))
    os.environ.update(MASTER_ADDR=store.host, MASTER_PORT=str(store.port))
    if gpus:
        torch.cuda.set_device(local_rank)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(1)
    limit = timedelta(seconds=timeout_s)
    td.init_process_group("nccl" if gpus else "gloo", store=store, rank=rank, world_size=world, timeout=limit)


def finish() -> None:
    """Leave together."""
    td.barrier()
    td.destroy_process_group()


def skip_destructors() -> None:
    """Last call of a rank that did its work: the process ends with code 0 and without C++ destructors. With gloo these
    abort now and then (`terminate called without an active exception`), and a finished rank would count as a failed one."""

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    atexit.register(leave)


def rank() -> int:
    """This process's rank; 0 without a group."""
    return td.get_rank() if td.is_initialized() else 0


def world() -> int:
    """Number of ranks; 1 without a group."""
    return td.get_world_size() if td.is_initialized() else 1


@contextmanager
def alone() -> Iterator[None]:
    """Within, the gathers below see one rank: the caller holds the whole batch already."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def gathering() -> int:
    """Over how many ranks a batch is spread as the gathers see it."""
    return 1 if _alone else world()


def offset(rows: int) -> int:
    """Where this rank's `rows` start in a gathered batch."""
    return 0 if _alone else rank() * rows


def gather_features(features: Tensor) -> Tensor:
    """Concatenate [B, D] over ranks. The backward sums over ranks and returns the own slice, so that DDP's average of
    per-rank losses has exactly the gradient of the whole batch on one rank."""
    if gathering() == 1:
        return features
    import torch.distributed.nn.functional as functional

    return torch.cat(functional.all_gather(features))


def gather_plain(x: Tensor) -> Tensor:
    """Concatenate [B, ...] over ranks, without gradient."""
    if gathering() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world())]
    td.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Differentiable sum over ranks."""
    if gathering() == 1:
        return x
    import torch.distributed.nn.functional as functional

    total: Tensor = functional.all_reduce(x)
    return total


def mean_over_ranks(x: Tensor) -> float:
    """Average of a scalar over ranks."""
    value = x.detach().float().clone()
    if world() > 1:
        td.all_reduce(value)
    return float(value.item()) / world()


def broadcast(value: Any) -> Any:
    """Rank 0's value, everywhere."""
    if world() == 1:
        return value
    box = [value]
    td.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait for all ranks."""
    if world() > 1:
        td.barrier()


class Control:
    """Small integers that ranks agree on (their maximum) once a step, on a CPU group of their own, so that no device
    waits for it: what is posted at one step is read at the next, by all ranks alike. A dead peer raises RuntimeError."""

    def __init__(self, timeout_s: float) -> None:
        self._group: Any = td.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if world() > 1 else None
        self._pending: tuple[Any, Tensor] | None = None

    def exchange(self, values: list[int]) -> list[int]:
        """Post `values`; return the maxima of what all ranks posted at the last call (zeros at the first)."""
        before = self.collect() or [0] * len(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        work = td.all_reduce(tensor, op=td.ReduceOp.MAX, group=self._group, async_op=True) if self._group else None
        self._pending = (work, tensor)
        return before

    def collect(self) -> list[int] | None:
        """The maxima of the last post, once."""
        if self._pending is None:
            return None
        work, tensor = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        return [int(v) for v in tensor]

    def agree(self, values: list[int]) -> list[int]:
        """The maxima now: waits for all ranks."""
        self.collect()
        self.exchange(values)
        agreed = self.collect()
        assert agreed is not None
        return agreed
