"""Running our commands, waiting, comparing, killing."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
SMALL = ["--images-per-caption", "2", "--captions-per-shard", "3", "--batch-size", "4", "--steps", "3"]


def command(*words: str, timeout: float = 300, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run `python launch/x.py ...` from another folder."""
    return subprocess.run(
        [sys.executable, str(REPO / words[0]), *map(str, words[1:])],
        capture_output=True, text=True, timeout=timeout, cwd="/", env={**os.environ, **extra},
    )  # fmt: skip


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Poll until the condition holds; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"waited {seconds} s for {what}")
        time.sleep(0.1)


def shard_bytes(run: Path) -> dict[str, bytes]:
    """Every tar of a run."""
    return {p.name: p.read_bytes() for p in sorted((run / "shards").glob("*.tar"))}


def local_pids(run: Path) -> list[int]:
    """Live processes that work on a run (submitit controllers and their tasks), found by their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if b"submitit" in line and str(run / "logs").encode() in line:
                found.append(int(entry.name))
    return found


def kill_all(run: Path) -> None:
    """SIGKILL whatever works on a run."""
    for pid in local_pids(run):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    wait_for(lambda: not local_pids(run), 20, "processes to die")
