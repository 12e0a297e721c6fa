"""The lab of the Slurm tests: real daemons where they are installed."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from lab import Lab
from slurm_need import need


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Four nodes, no accounting, MaxArraySize 11."""
    need(False)
    with Lab(nodes=4, max_array=11) as made:
        yield made


@pytest.fixture(autouse=True)
def whole_cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test finds all nodes idle, whatever the one before it left."""
    yield
    if "lab" in request.fixturenames:
        request.getfixturevalue("lab").restore()
