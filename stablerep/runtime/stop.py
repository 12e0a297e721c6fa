"""The stop flag: handlers of USR1, USR2, TERM and HUP set it and do nothing else."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP)


class StopFlag:
    """Remembers the first stop signal. Work loops ask `requested` at a boundary where they can stop cleanly."""

    def __init__(self) -> None:
        self.requested: str | None = None

    def install(self) -> "StopFlag":
        """Install the handlers (main thread only) and return self."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested = self.requested or signal.Signals(number).name


@contextmanager
def blocked() -> Iterator[None]:
    """Hold stop signals back while helpers are forked, so that none dies before it can call `ignore`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def ignore() -> None:
    """In a helper (a data-loader worker): Slurm signals every process of a step, and the helper ends with its parent."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
