"""Skip or fail where the daemons are missing."""

import os

import pytest
from lab import missing


def need(accounting: bool) -> None:
    """Skip only where Slurm is missing and cannot be installed (not root)."""
    absent = missing(accounting)
    if absent and os.getuid() != 0:
        pytest.skip(f"not installed, and we are not root: {', '.join(absent)}")
    assert not absent, f"not installed: {absent}; sh tests/slurm/install.sh says why"
