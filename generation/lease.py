"""Leases: a worker owns a shard while its lease file exists and is fresh. The file system is the only arbiter."""

import json
import os
import threading
from pathlib import Path


class Leases:
    """Claims on numbered pieces of work under `folder`, held by the process `name`.

    A lease is a file created with O_EXCL whose mtime a thread keeps fresh. Ages are read on the file server's clock:
    the mtime of a file we just touched, minus the lease's. Two holders of one lease are harmless to the data (an image
    is a function of its identity), so a lease only saves work, and a race in a takeover costs a shard's time at worst.
    """

    def __init__(self, folder: Path, name: str, timeout_s: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name, self.timeout_s = folder, name, timeout_s
        self._clock = folder / f".clock-{name}"
        self._held: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def path(self, number: int) -> Path:
        """The lease file of a piece of work."""
        return self.folder / f"{number:06d}.lease"

    def claim(self, number: int) -> str | None:
        """Try to take a lease: `claimed`, `taken over` from a silent holder, or None where somebody holds it."""
        if self._create(number):
            return "claimed"
        age = self.age(number)
        if age is None or age <= self.timeout_s:
            return None
        try:  # of all that see it stale, one wins the rename
            os.rename(self.path(number), self.folder / f".stale-{number:06d}-{self.name}")
        except FileNotFoundError:
            return None
        (self.folder / f".stale-{number:06d}-{self.name}").unlink(missing_ok=True)
        return "taken over" if self._create(number) else None

    def release(self) -> None:
        """Give the held lease back; somebody else's is left alone."""
        if self._held is not None:
            path = self.path(self._held)
            self._held = None
            try:
                if json.loads(path.read_text())["name"] == self.name:
                    path.unlink()
            except (OSError, ValueError, KeyError):
                pass

    def close(self) -> None:
        """Release, stop the heartbeat, remove the clock file."""
        self._stop.set()
        self._thread.join()
        self.release()
        self._clock.unlink(missing_ok=True)

    def age(self, number: int) -> float | None:
        """Seconds since the holder's last heartbeat on the file server's clock; None where there is no lease."""
        self._clock.touch()
        try:
            return self._clock.stat().st_mtime - self.path(number).stat().st_mtime
        except FileNotFoundError:
            return None

    def _create(self, number: int) -> bool:
        try:
            descriptor = os.open(self.path(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, json.dumps({"name": self.name}).encode())
        except OSError:  # a full disk
            self.path(number).unlink()
            raise
        finally:
            os.close(descriptor)
        self._held = number
        return True

    def _beat(self) -> None:
        while not self._stop.wait(self.timeout_s / 5):
            held = self._held
            if held is not None:
                try:
                    os.utime(self.path(held))
                except OSError:
                    continue  # taken over, or a hiccup of the file system: the work goes on, it is harmless
