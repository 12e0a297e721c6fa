"""A checkpoint an epoch, for protocols that train for hours: a killed evaluation goes on where it stood."""

import io
from pathlib import Path
from typing import Any

import torch

from stablerep.runtime import dist
from stablerep.runtime.errors import UsageError, WorkError
from stablerep.runtime.rundir import write_atomic


def save_epoch(path: Path, facts: dict[str, Any], model: Any, optimizer: Any) -> None:
    """Rank 0 writes the checkpoint in place of the one before; `facts` has `epoch`, those that are done. Collective.
    Raises WorkError."""
    problem = None
    if dist.rank() == 0:
        buffer = io.BytesIO()
        torch.save({**facts, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
        try:
            write_atomic(path, buffer.getvalue())
        except OSError as error:
            problem = f"cannot write {path}: {error.strerror}; make room and give the same command again"
    problem = dist.broadcast(problem)
    if problem:
        raise WorkError(problem)


def load_epoch(path: Path, identity: dict[str, Any], model: Any, optimizer: Any, device: str) -> int:
    """Fill model and optimizer from the checkpoint, if there is one of the same `identity`; the epochs that are done.
    Collective. Raises UsageError."""
    if not dist.broadcast(path.exists()):
        return 0
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception:  # torn bytes end in whatever the unpickler stumbles over
        raise UsageError(f"{path} is broken: remove it, and the training begins anew") from None
    if {k: state.get(k) for k in identity} != identity:
        raise UsageError(f"{path} is of another encoder, labels or settings: give another folder or remove it")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["epoch"])
