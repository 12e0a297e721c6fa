"""Leases: a worker owns a shard while its lease file exists and is fresh. The file system is the only arbiter."""

import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

Work = int | str  # a shard's number, or the name of another piece of work


class Leases:
    """Claims on pieces of work under `folder`, held by the process `name`; any number at once, from any of its threads.

    A lease is a file created with O_EXCL whose mtime a thread keeps fresh. Ages are read on the file server's clock: the
    mtime of a file that this thread touches too, and the time since. Two holders of one lease are harmless to the data (an
    image is a function of its identity), so a lease only saves work, and a race in a takeover costs a shard's time at worst.
    """

    def __init__(self, folder: Path, name: str, timeout_s: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name, self.timeout_s = folder, name, timeout_s
        self._clock = folder / f".clock-{name}"
        self._read_clock()
        self._touched: dict[Work, float] = {}  # every lease that we hold: when it was made fresh, by time.monotonic
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def path(self, work: Work) -> Path:
        """The lease file of a piece of work."""
        return self.folder / (f"{work:06d}.lease" if isinstance(work, int) else f"{work}.lease")

    def claim(self, work: Work) -> str | None:
        """Try to take a lease: `claimed`, `taken over` from a silent holder, or None where somebody holds it."""
        if self._create(work):
            return "claimed"
        age = self.age(work)
        if age is None or age <= self.timeout_s:
            return None
        stale = self.folder / f".stale-{self.path(work).stem}-{self.name}"
        try:  # of all that see it stale, one wins the rename
            os.rename(self.path(work), stale)
        except FileNotFoundError:
            return None
        stale.unlink(missing_ok=True)
        return "taken over" if self._create(work) else None

    def release(self, work: Work) -> None:
        """Give a lease back that we hold; somebody else's is left alone."""
        ours = self._is_ours(work)
        with self._lock:
            held = self._touched.pop(work, None) is not None
        if held and ours:
            with suppress(OSError):
                self.path(work).unlink()

    def close(self) -> None:
        """Stop the heartbeat, release everything, remove the clock file."""
        self._stop.set()
        self._thread.join()
        for work in list(self._touched):
            self.release(work)
        self._clock.unlink(missing_ok=True)

    def age(self, work: Work) -> float | None:
        """Seconds since the holder's last heartbeat on the file server's clock; None where there is no lease."""
        try:
            return time.monotonic() + self._ahead - self.path(work).stat().st_mtime
        except FileNotFoundError:
            return None

    def _create(self, work: Work) -> bool:
        now = time.monotonic()
        try:
            descriptor = os.open(self.path(work), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, json.dumps({"name": self.name}).encode())
        except OSError:  # a full disk
            self.path(work).unlink()
            raise
        finally:
            os.close(descriptor)
        with self._lock:
            self._touched[work] = now
        return True

    def _is_ours(self, work: Work) -> bool:
        """Whether nobody took our lease over. Within the time-out after our touch nobody can have; later, the file says."""
        touched = self._touched.get(work)
        if touched is not None and time.monotonic() - touched < self.timeout_s:
            return True
        try:
            return bool(json.loads(self.path(work).read_text())["name"] == self.name)
        except (OSError, ValueError, KeyError):
            return False

    def _read_clock(self) -> None:
        self._clock.touch()
        self._ahead = self._clock.stat().st_mtime - time.monotonic()

    def _beat(self) -> None:
        while not self._stop.wait(self.timeout_s / 5):
            with suppress(OSError):  # a hiccup of the file system: the work goes on, it is harmless
                self._read_clock()
            for work in list(self._touched):
                now = time.monotonic()
                if not self._is_ours(work):
                    continue
                try:
                    os.utime(self.path(work))
                except OSError:
                    continue
                with self._lock:
                    if work in self._touched:
                        self._touched[work] = now
