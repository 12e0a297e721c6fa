"""How far a long call is: a live line on a terminal, plain lines in a log."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOG_S, TERMINAL_S = 10.0, 0.5


@contextmanager
def percent(what: str, look: Callable[[], float]) -> Iterator[None]:
    """While the block runs, print what per cent of it is done and how long the rest will take; `look` says it (0 to 100).

    Nothing is printed of what ends at once. `look` is called in a thread.
    """
    live, over, start = sys.stdout.isatty(), threading.Event(), time.monotonic()

    def speak() -> None:
        while not over.wait(TERMINAL_S if live else LOG_S):
            done, spent = max(0.0, look()), time.monotonic() - start
            left = f"about {spent * (100 - done) / done:.0f} s left" if done >= 1 else ""
            line = f"{what}: {done:.0f} %, {spent:.0f} s  {left}".rstrip()
            print(f"\r\x1b[K{line}" if live else line, end="" if live else "\n", flush=True)
        if live:
            print("\r\x1b[K", end="", flush=True)

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
