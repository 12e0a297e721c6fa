"""Worker processes that read, decode and crop the rows of batches into memory shared with this process.

Each batch lies in a slot of shared memory, and each worker fills an equal part of its rows. A worker that dies is
replaced, and does its tasks again: what they yield depends on nothing but the task.
"""

import contextlib
import ctypes
import itertools
import mmap
import os
import signal
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe

import cv2
import numpy as np

from stablerep.data.augment import View
from stablerep.data.chance import derive, hashes, uniforms
from stablerep.data.crop import NUMBERS, crops
from stablerep.data.index import Index
from stablerep.data.order import Rows
from stablerep.runtime.errors import WorkError
from stablerep.runtime.stop import blocked, ignore

TRIES = 20  # pictures that are tried in place of a broken one
LIVES = 3  # times that a task may kill a worker


@dataclass(frozen=True)
class Task:
    """Rows of a step that belong at `at`, at + 1, ... of a slot."""

    step: int
    slot: int
    at: int
    rows: Rows


@dataclass
class Filled:
    """What a task came to: the images and captions that were used, the texts, and the broken ones: (image, why)."""

    images: list[int] = field(default_factory=list)
    captions: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    broken: list[tuple[int, str]] = field(default_factory=list)


class Slots:
    """Shared memory for `count` batches of `rows` rows: `views[s][v]` is uint8 [rows, 3, size, size]."""

    def __init__(self, count: int, rows: int, views: list[View]) -> None:
        shapes = [(rows, 3, v.size, v.size) for v in views]
        sizes = [int(np.prod(shape)) for shape in shapes]
        self.memory = np.frombuffer(mmap.mmap(-1, count * sum(sizes)), np.uint8).reshape(count, -1)
        edges = np.cumsum([0, *sizes])
        self.views = [[slot[edges[v] : edges[v + 1]].reshape(shape) for v, shape in enumerate(shapes)] for slot in self.memory]


@dataclass
class Worker:
    """A worker process and the tasks it was given and has not answered, in order."""

    pid: int
    pipe: Connection
    tasks: deque[Task] = field(default_factory=deque)
    deaths: int = 0


class Workers:
    """`count` worker processes over shared slots. Use as a context manager, from the main thread."""

    def __init__(self, count: int, slots: Slots, index: Index, views: list[View], seed: int, texts: bool) -> None:
        self.slots, self._work = slots, (slots, index, views, seed, texts)
        self.deaths: list[str] = []  # sentences on workers that died and were replaced
        self._workers = [Worker(*self._fork()) for _ in range(count)]

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.pipe.close()
            os.kill(worker.pid, signal.SIGKILL)
            os.waitpid(worker.pid, 0)

    def send(self, step: int, slot: int, rows: Rows) -> None:
        """Have the rows of a batch filled into a slot, shared out evenly."""
        edges = np.linspace(0, len(rows.images), len(self._workers) + 1).astype(int).tolist()
        for worker, first, last in zip(self._workers, edges[:-1], edges[1:], strict=True):
            task = Task(step, slot, first, rows.part(first, last))
            worker.tasks.append(task)
            self._give(worker, task)

    def receive(self) -> list[Filled]:
        """Wait for the oldest batch: its parts, in order. Raises WorkError."""
        return [self._answer(worker) for worker in self._workers]

    def _answer(self, worker: Worker) -> Filled:
        while True:
            try:
                answer = worker.pipe.recv()
            except (EOFError, OSError):
                self._replace(worker)
                continue
            if isinstance(answer, str):
                raise WorkError(answer)
            worker.tasks.popleft()
            worker.deaths = 0
            return answer

    def _give(self, worker: Worker, task: Task) -> None:
        with contextlib.suppress(OSError):  # it is dead, as `_answer` will find
            worker.pipe.send(task)

    def _replace(self, worker: Worker) -> None:
        """Start a worker in place of a dead one, with the tasks that it left. Raises WorkError where they keep killing."""
        status = os.waitstatus_to_exitcode(os.waitpid(worker.pid, 0)[1])
        how = f"died of {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"
        worker.deaths += 1
        doing = f"loader worker {worker.pid} {how} at step {worker.tasks[0].step}"
        self.deaths.append(doing)
        worker.pipe.close()
        worker.pid, worker.pipe = self._fork()
        if worker.deaths >= LIVES:
            raise WorkError(f"{doing}, {LIVES} times at the same rows: out of memory, or a picture that breaks the decoder")
        for task in worker.tasks:
            self._give(worker, task)

    def _fork(self) -> tuple[int, Connection]:
        ours, theirs = Pipe()
        parent = os.getpid()
        with blocked():
            pid = os.fork()
            if pid == 0:
                _worker(parent, theirs, ours, *self._work)
        theirs.close()
        return pid, ours


def _worker(
    parent: int, pipe: Connection, parents: Connection, slots: Slots, index: Index, views: list[View], seed: int, texts: bool
) -> None:
    """The life of a worker; never returns. Stop signals are the parent's business; the worker goes when the parent goes."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        ignore()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        parents.close()
        if os.getppid() == parent:
            _serve(pipe, slots, index.reopened(), views, seed, texts)
    finally:
        os._exit(0)


def _serve(pipe: Connection, slots: Slots, index: Index, views: list[View], seed: int, texts: bool) -> None:
    cv2.setNumThreads(1)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(fill(task, slots, index, views, seed, texts))
        except WorkError as error:
            pipe.send(str(error))
        except Exception as error:  # a fault of ours, to be shown where somebody looks
            pipe.send(f"loader worker {os.getpid()} failed at step {task.step}: {type(error).__name__}: {error}")


def fill(task: Task, slots: Slots, index: Index, views: list[View], seed: int, texts: bool) -> Filled:
    """Do a task: crop every view of its rows into their slot. Raises WorkError."""
    keys = [derive("crop", seed, task.step, number) for number in range(len(views))]
    draws = np.stack([uniforms(key, task.rows.positions, NUMBERS) for key in keys], axis=1)
    filled = Filled()
    for row, (image, caption) in enumerate(zip(task.rows.images.tolist(), task.rows.captions.tolist(), strict=True)):
        out = [view[task.at + row] for view in slots.views[task.slot]]
        image, caption = _sound(index, image, caption, views, draws[row], out, filled.broken)
        filled.images.append(image)
        filled.captions.append(caption)
        filled.texts.append(index.text(caption) if texts else "")
    return filled


def _sound(
    index: Index,
    image: int,
    caption: int,
    views: list[View],
    draws: np.ndarray,
    out: list[np.ndarray],
    broken: list[tuple[int, str]],
) -> tuple[int, int]:
    """Write the crops of an image to `out`, or of its replacement where it is broken: (image, caption) of what was used."""
    for candidate, owner in itertools.islice(_candidates(index, image, caption), TRIES):
        try:
            crops(index.read(candidate), views, draws, out)
            return candidate, owner
        except Exception as error:  # a decoder may raise anything on bytes that are no picture
            broken.append((candidate, f"{type(error).__name__}: {error}"))
            failed = broken[-1][1]
    raise WorkError(f"{TRIES} pictures in a row cannot be read, from {index.name(image)} on; the last one: {failed}")


def _candidates(index: Index, image: int, caption: int) -> Iterator[tuple[int, int]]:
    """(image, caption) to try in turn: the image, the others of its caption, then those of other captions of its source.

    A pure function of image and caption; the rows of a caption that is broken as a whole move to one other together.
    """
    yield image, caption
    source, place = index.source_of(caption), image - int(index.first[caption])
    others = source.first + hashes(derive("instead"), np.array([caption]), TRIES)[0] % np.uint64(source.captions)
    for owner in [caption, *others.tolist()]:
        first, count = int(index.first[owner]), int(index.first[owner + 1] - index.first[owner])
        for k in range(count):
            candidate = first + (place + k) % count
            if candidate != image:
                yield candidate, owner
