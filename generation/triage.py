"""Triage: what kind of fault an exception is, and what a worker does about it.

| kind         | what it is                              | what the worker does                                          |
|--------------|-----------------------------------------|---------------------------------------------------------------|
| `oom`        | a batch does not fit the memory         | halves a batch of `auto` size; else releases the shard, ends  |
| `gpu`        | CUDA, cuDNN, ECC, the driver            | releases the shard and ends; its job moves to another node    |
| `io`         | full disk, stale handle, no file server | releases the shard, waits, goes on; ends after the last wait  |
| `shard`      | any other: a caption, a mistake of ours | records the failure, goes on with the next shard              |
| `nan`        | many images of a shard needed float32   | commits the shard and records it                              |
| `preemption` | a signal before the wall time is due    | releases the shard and ends; its job is requeued              |
| `walltime`   | the warning ahead of the job's end      | the same                                                      |

A batch size that was asked for is not made smaller: an image's last bits depend on it, and it is part of the plan.
`oom` and `io` are no fault of a shard; `gpu` and `shard` count as failed attempts at it (see `failures`). Events and failures
name the kind as `fault`.
"""

import errno
import re
from enum import StrEnum

from stablerep.runtime.errors import WorkError

IO_WAITS_S = (1.0, 5.0, 25.0, 125.0)  # after the first, second ... I/O error without a shard committed in between
NAN_STORM = 0.1  # share of a shard's images made again in float32: one in ten is no accident
WARNING_S = 600.0  # a signal that comes so shortly before the end of the wall time warns of it

NO_MEMORY = re.compile(r"out of memory|can't allocate memory|_STATUS_ALLOC_FAILED", re.IGNORECASE)
NO_GPU = re.compile(r"CUDA (unknown )?error|CUDA driver|No CUDA GPUs|NVIDIA driver|CU(DNN|BLAS)_STATUS_|cuDNN error|NVML")
PERMISSIONS = (errno.EACCES, errno.EPERM, errno.EROFS)  # waiting does not change them


class Kind(StrEnum):
    """Kinds of faults, as events and failures name them."""

    OOM = "oom"
    GPU = "gpu"
    IO = "io"
    SHARD = "shard"
    NAN = "nan"
    PREEMPTION = "preemption"
    WALLTIME = "walltime"


class WorkerEnds(WorkError):
    """A worker cannot go on here, and says in one line why: `oom`, `gpu`, or `io` after the last wait."""

    def __init__(self, kind: Kind, why: str) -> None:
        super().__init__(why)
        self.kind = kind


def kind_of(error: Exception) -> Kind:
    """The kind of an exception from making a shard.

    Torch's classes go by their names, for this runs before torch is there. An OSError without a number does not come from
    the system: that is how Arrow says that a file is corrupt.
    """
    name, said = type(error).__name__, str(error) if isinstance(error, RuntimeError) else ""
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or NO_MEMORY.search(said):
        return Kind.OOM
    if name == "AcceleratorError" or NO_GPU.search(said):
        return Kind.GPU
    return Kind.IO if isinstance(error, OSError) and error.errno is not None else Kind.SHARD


def wait_s(error: OSError, waited: int) -> float | None:
    """Seconds to wait before work goes on after an I/O error, `waited` waits after the last commit; None: not again."""
    return None if error.errno in PERMISSIONS or waited >= len(IO_WAITS_S) else IO_WAITS_S[waited]


def smaller_batch(batch_size: int) -> str:
    """What to plan with where a batch of this size does not fit."""
    if batch_size == 1:
        return "one image does not fit: plan a run with a smaller --resolution, or take larger GPUs"
    return f"plan a run (another --out) with --batch-size {batch_size // 2}, or take larger GPUs"


def interruption(now: float, end: float | None) -> Kind:
    """What a signal meant that came at `now`, where the wall time ends at `end` (Unix times; None: no limit)."""
    return Kind.WALLTIME if end is not None and end - now <= WARNING_S else Kind.PREEMPTION
