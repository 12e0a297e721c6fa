"""Progress of a run from its files: a live bar on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class Progress:
    """Where a run stands: done and total units (images or steps), and whether it is complete."""

    done: int
    total: int
    complete: bool
    detail: str = ""


def duration(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def last_word(logs: Iterable[Path], default: str) -> str:
    """What went wrong by these logs: the last line that says `error: `, else the last line, else `default`."""
    lines = [line.strip() for log in logs for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [default])[-1]


def watch(look: Callable[[], Progress], active: Callable[[], object], unit: str, until_idle: bool = True) -> bool:
    """Show progress until the run is complete or no job is left; whether it is complete. Ctrl-C detaches."""
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False)
    start, first, spoken = time.monotonic(), look().done, -1e9
    with console.status("starting") if console.is_terminal else _nothing() as status:
        while True:
            alive = active()  # asked before the files are read: what ended in between is seen there
            seen = look()
            elapsed = time.monotonic() - start
            rate = (seen.done - first) / elapsed if elapsed > 0 else 0.0
            eta = duration((seen.total - seen.done) / rate) if rate > 0 else "?"
            line = f"{seen.done}/{seen.total} {unit}  {rate:.1f} {unit}/s  ETA {eta}  {seen.detail}".rstrip()
            over = seen.complete or (until_idle and not alive)
            if status is not None:
                status.update(line)
            elif over or elapsed - spoken >= 10:
                spoken = elapsed
                print(line, flush=True)
            if over:
                return seen.complete
            time.sleep(0.5)


class Every(Generic[T]):
    """Calls a function at most every `seconds`, and repeats its last answer in between: a watcher is gentle to Slurm."""

    def __init__(self, seconds: float, function: Callable[[], T]) -> None:
        self.seconds, self.function, self.due = seconds, function, 0.0

    def __call__(self) -> T:
        if time.monotonic() >= self.due:
            self.answer = self.function()
            self.due = time.monotonic() + self.seconds
        return self.answer


class _nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None
