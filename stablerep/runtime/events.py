"""Events: one JSONL file per process under RUN/events/, the record of who did what, when and why."""

import errno
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stablerep.runtime.rundir import read_jsonl


class Events:
    """Append events of this process to RUN/events/NAME.jsonl (started, committed, taken over, failed ...).

    The file stays open. An event is a single write, so that readers see whole lines, and lies on the disk or the file
    server when `write` returns. `always` goes into every event: ranks of training name their `life` and `rank`.
    """

    def __init__(self, run: Path, name: str, **always: Any) -> None:
        self.name, self.always = name, always
        self.path = run / "events" / f"{name}.jsonl"
        self._file: int | None = None
        self._torn = b""  # ends the line before, where a full disk took a part of it only
        self._lock = threading.Lock()

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event; `kind` is a past participle such as `committed`. Raises OSError; the next event opens anew."""
        event = {"time": time.time(), "event": kind, "process": self.name, **self.always, **fields}
        line = (json.dumps(event, ensure_ascii=False) + "\n").encode()
        with self._lock:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                if os.write(self._file, self._torn + line) < len(self._torn + line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fdatasync(self._file)
                self._torn = b""
            except OSError:  # the handle may be stale
                file, self._file, self._torn = self._file, None, b"\n"
                os.close(file)
                raise

    def ahead_s(self) -> float:
        """Seconds that this machine's clock is ahead of the file server's. Who compares events of processes subtracts it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        return round(time.time() - self.path.stat().st_mtime, 2)


def process_name(prefix: str) -> str:
    """A name unique to this process: prefix, Slurm job or host, task, restart, pid."""
    env = os.environ
    job = env.get("SLURM_ARRAY_JOB_ID", env.get("SLURM_JOB_ID", os.uname().nodename))
    task = env.get("SLURM_ARRAY_TASK_ID", "0")
    return f"{prefix}-{job}_{task}-r{env.get('SLURM_RESTART_COUNT', '0')}-{os.getpid()}"


def read_events(run: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of every process of a run, file by file."""
    for path in sorted((run / "events").glob("*.jsonl")):
        yield from read_jsonl(path)
