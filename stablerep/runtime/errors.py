"""The two ways a command ends badly; both are shown as one line on stderr, never as a traceback."""


class UsageError(Exception):
    """Bad usage or input: nothing was written (exit code 2)."""


class WorkError(Exception):
    """The work itself failed (exit code 1)."""
