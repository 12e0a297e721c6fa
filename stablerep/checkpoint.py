"""Checkpoints that know no rank count, written by all ranks at once and in the background, complete or absent.

A checkpoint is a folder of parts, one a rank that wrote it: float32 parameters and AdamW's moments cut into fragments
`param/NAME@start`. Any number of ranks puts them together again, each reading only what it holds. `state.json` and the
folder's rename come last, after every part is on the disk.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stablerep import engine as deepspeed_engine
from stablerep.runtime import dist
from stablerep.runtime.errors import WorkError
from stablerep.runtime.events import Events
from stablerep.runtime.rundir import read_json, sync_folder, write_atomic, write_json

KEPT = 2


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def complete_steps(run: Path) -> list[int]:
    """Steps with a complete checkpoint, oldest first."""
    return sorted(int(p.name.split("-")[1]) for p in (run / "checkpoints").glob("step-*") if (p / "state.json").exists())


class Saver:
    """Saves in the background. `save` returns when the state is copied to host memory. At every step the ranks agree on
    `progress()` (the maximum) and give it to `poll`, which commits once the part of every rank is on the disk. Events say
    `saved` or, on the rank where it happened, `save failed`: then the training goes on and the next save tries again."""

    def __init__(self, run: Path, keep_every: int, control: dist.Control, events: Events) -> None:
        self.run, self.keep_every, self.control, self.events = run, keep_every, control, events
        self.seconds: float | None = None  # what the last save took in all
        self._step = 0  # of the save under way; 0 where there is none
        self._settled = 0  # newest step whose part is written, or could not be
        self._failed = 0  # newest step whose part could not be written
        self._stall_s, self._write_s = 0.0, 0.0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._host: dict[str, Tensor] = {}
        self._state: dict[str, Any] = {}
        if dist.rank() == 0:
            _clean(run)

    def save(self, engine: Any, step: int, extra: dict[str, Any]) -> float:
        """Copy this rank's part of the state after `step` steps to the host and begin to write it; seconds that took.
        `extra` goes into state.json. Collective: a save still under way is waited for first."""
        begin = time.monotonic()
        self.finish()
        self._host = host_copy(engine, self._host)
        self._state = {"step": step, "applied": deepspeed_engine.applied_steps(engine), "parts": dist.world()}
        self._state |= {"scaler": deepspeed_engine.scaler_state(engine), **extra}
        self._step = step
        self._writing = self._writer.submit(self._write, step)
        self._stall_s = time.monotonic() - begin
        return self._stall_s

    def progress(self) -> list[int]:
        """For the ranks to agree on: the step that failed here, and minus the step that is settled here."""
        return [self._failed, -self._settled]

    def poll(self, failed: int, minus_settled: int) -> None:
        """Act on what the ranks agreed on: commit the save under way, give it up, or let it go on."""
        if not self._step or -minus_settled < self._step:
            return
        step, self._step = self._step, 0
        self.seconds = self._stall_s + self._write_s
        if dist.rank() == 0 and failed != step and self._commit(step):
            self.events.write("saved", step=step, stall_s=round(self._stall_s, 4), write_s=round(self._write_s, 4))
            self._writer.submit(_prune, self.run, self.keep_every)
        elif dist.rank() == 0:
            self._writer.submit(shutil.rmtree, temporary_folder(self.run, step), True)

    def finish(self) -> None:
        """Wait until the save under way is complete, or has failed on any rank. Collective."""
        if self._step and self._writing is not None:
            self._writing.result()
            self.poll(*self.control.agree(self.progress()))

    def close(self) -> None:
        """Finish, and end the writer. Collective."""
        self.finish()
        self._writer.shutdown(wait=True)

    def _write(self, step: int) -> None:
        begin = time.monotonic()
        try:
            path = temporary_folder(self.run, step) / part_name(dist.rank(), dist.world())
            write_atomic(path, encode(self._host))
        except OSError as error:
            self._give_up(step, error)
        self._write_s = time.monotonic() - begin
        self._settled = step

    def _commit(self, step: int) -> bool:
        final, temporary = step_folder(self.run, step), temporary_folder(self.run, step)
        try:
            write_json(temporary / "state.json", self._state)
            os.rename(temporary, final)
            sync_folder(final.parent)
        except OSError as error:
            self._give_up(step, error)
            return False
        return True

    def _give_up(self, step: int, error: OSError) -> None:
        self._failed = step
        self.events.write("save failed", step=step, why=f"{error.strerror or error}; older checkpoints are kept")


def temporary_folder(run: Path, step: int) -> Path:
    """Where a checkpoint grows until it is complete."""
    return run / "checkpoints" / f".step-{step:08d}.tmp"


def part_name(rank: int, world: int) -> str:
    """File name of a rank's part."""
    return f"part-{rank:05d}-of-{world:05d}.safetensors"


def host_copy(engine: Any, host: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's fragments in host memory (pinned where there is a GPU): `param/NAME@start` and the moments, float32;
    rank 0 adds `average/NAME`. The buffers `host` of the last call are used again."""
    tensors = {
        f"{kind}/{fragment.name}@{fragment.start}": value
        for fragment in deepspeed_engine.fragments(engine)
        for kind, value in fragment.tensors.items()
    }
    if dist.rank() == 0:
        tensors |= {f"average/{name}": value for name, value in engine.module.averages.items()}
    pinned = torch.cuda.is_available()
    for name, value in tensors.items():
        if name not in host:
            host[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
        host[name].copy_(value.detach(), non_blocking=True)
    if pinned:
        torch.cuda.synchronize()
    return host


def encode(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """float32 tensors in the safetensors format, piece by piece: no second copy in memory, and the interpreter's lock is
    free while a piece is written, so that the training goes on (safetensors' own `save` would hold it)."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield tensor.numpy().data.cast("B")


@torch.no_grad()
def load_newest(run: Path, engine: Any) -> dict[str, Any]:
    """Load the newest complete checkpoint and return its state.json; `{"step": 0}` where there is none.

    Rank 0 decides which, every rank reads what it holds. Raises WorkError where the checkpoint is of another model.
    """
    steps = complete_steps(run) if dist.rank() == 0 else []
    step = int(dist.broadcast(steps[-1] if steps else 0))
    if step == 0:
        return {"step": 0}
    folder = step_folder(run, step)
    state: dict[str, Any] = read_json(folder / "state.json")
    parts = _Parts(folder)
    for fragment in deepspeed_engine.fragments(engine):
        for kind, value in fragment.tensors.items():
            parts.read(f"{kind}/{fragment.name}", fragment.start, value)
    shapes = {f"param/{name}": p.numel() for name, p in engine.module.named_parameters() if p.requires_grad}
    parts.check(shapes)
    for name, tensor in engine.module.averages.items():
        parts.read_whole(f"average/{name}", tensor)
    deepspeed_engine.set_scaler_state(engine, state["scaler"])
    deepspeed_engine.finish_loading(engine, state["applied"])
    return state


class _Parts:
    """The fragments of a checkpoint, wherever they lie."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.folder = folder
        self.places: dict[str, list[tuple[int, int, Any, str]]] = {}  # name -> (start, numel, file, key)
        for path in sorted(folder.glob("part-*.safetensors")):
            file = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118 (not a dict)
                name, _, start = key.partition("@")
                numel = file.get_slice(key).get_shape()[0] if start else 0
                self.places.setdefault(name, []).append((int(start or 0), numel, file, key))

    def read(self, name: str, start: int, into: Tensor) -> None:
        """Fill `into` (1-D) with elements start .. start + len(into) of a tensor."""
        end, found = start + into.numel(), 0
        for first, numel, file, key in self.places.get(name, []):
            low, high = max(start, first), min(end, first + numel)
            if low < high:
                into[low - start : high - start].copy_(file.get_slice(key)[low - first : high - first])
                found += high - low
        if found != into.numel():
            raise WorkError(f"{self.folder} does not hold {name}: it was saved by another model; use another --out")

    def read_whole(self, name: str, into: Tensor) -> None:
        """Fill `into` with a tensor that was not cut."""
        if name not in self.places:
            raise WorkError(f"{self.folder} does not hold {name}: it was saved by another method; use another --out")
        _, _, file, key = self.places[name][0]
        into.copy_(file.get_tensor(key))

    def check(self, sizes: dict[str, int]) -> None:
        """Raise WorkError unless the checkpoint holds these parameters and no others."""
        held = {n: sum(p[1] for p in places) for n, places in self.places.items() if n.startswith("param/")}
        wrong = sorted(n for n in held.keys() | sizes.keys() if held.get(n) != sizes.get(n))
        if wrong:
            raise WorkError(f"{self.folder} was saved by another model ({wrong[0]} does not fit): use another --out")


def _clean(run: Path) -> None:
    """Drop what killed saves left behind."""
    for path in (run / "checkpoints").glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _prune(run: Path, keep_every: int) -> None:
    """Keep the newest two, and every `keep_every`-th step in its place (a milestone costs no copy)."""
    for step in complete_steps(run)[:-KEPT]:
        if not (keep_every and step % keep_every == 0):
            shutil.rmtree(step_folder(run, step), ignore_errors=True)
