"""Last words of a process that ends badly, and the watchdog that ends one that hangs."""

import faulthandler
import os
import threading
import time
from pathlib import Path

from stablerep.runtime.events import Events

EXIT_CODE = 70
FIRST_STEP_S = 1800.0  # compiling, filling caches and the loader come before the first step


def collective_timeout(hang_timeout_s: float) -> float:
    """Seconds that a rank waits for its peers in a collective: long enough that the watchdog, which keeps the stacks, is
    first to end a job that hangs."""
    return 2 * max(hang_timeout_s, FIRST_STEP_S)


def last_words(run: Path, life: str, rank: int) -> Path:
    """The file that the last words of a rank go to; all ranks of one life of a job share its folder."""
    return run / "last_words" / life / f"{rank}.txt"


class Watchdog:
    """Ends this process with code 70 when `beat` was not called for `timeout_s` seconds (before the first beat: at least
    half an hour), after writing every thread's stack to `words` and a `hung` event. Its peers then fail in their next
    collective, or are ended by srun."""

    def __init__(self, words: Path, events: Events, timeout_s: float, first_s: float = FIRST_STEP_S) -> None:
        self.words, self.events, self.timeout_s = words, events, timeout_s
        self.deadline = time.monotonic() + max(timeout_s, first_s)
        self.closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """The process is alive: another `timeout_s` seconds."""
        self.deadline = time.monotonic() + self.timeout_s

    def close(self) -> None:
        """Watch no longer."""
        self.closed.set()

    def _watch(self) -> None:
        while not self.closed.wait(min(1.0, self.timeout_s / 4)):
            if time.monotonic() > self.deadline:
                self._end()

    def _end(self) -> None:
        why = f"no step within {self.timeout_s:.0f} s: the process hangs"
        try:
            self.words.parent.mkdir(parents=True, exist_ok=True)
            with open(self.words, "w") as file:
                print(f"{why}. Every thread's stack:", file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
            self.events.write("hung", why=why, words=str(self.words))
        finally:
            os._exit(EXIT_CODE)
