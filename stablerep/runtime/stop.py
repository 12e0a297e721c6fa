"""The stop flag: set by USR1, USR2, TERM and HUP, and by the clock ahead of the end of the job's wall time."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP)
MARGIN_S = 30.0  # for the step that runs, the barrier and the requeue


class StopFlag:
    """Remembers why to stop. Work loops ask `requested` at a boundary where they can stop cleanly.

    `end` is the Unix time at which the scheduler ends the job (None: never). The loop sets `save_s` to the seconds that a
    blocking save was measured to take; until then `first_lead_s` is allowed for it.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.end: float | None = None
        self.save_s: float | None = None
        self.first_lead_s = 120.0

    @property
    def lead_s(self) -> float:
        """Seconds before `end` at which to stop: three times the measured save, and a margin."""
        return self.first_lead_s if self.save_s is None else 3 * self.save_s + MARGIN_S

    @property
    def requested(self) -> str | None:
        """The name of the first stop signal, or `walltime`; None while there is no reason to stop."""
        if self.signal is None and self.end is not None and time.time() > self.end - self.lead_s:
            return "walltime"
        return self.signal

    def install(self) -> "StopFlag":
        """Install the handlers (main thread only) and return self."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number).name


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
