"""The stop flag: handlers of USR1, USR2, TERM and HUP set it and do nothing else."""

import signal
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


def reset_in_child() -> None:
    """Undo the handlers in a forked helper (a data-loader worker): it must die on TERM and ignore the user signals."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
