"""A small caption list, and a reference dataset made by one worker."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from helpers import REPO, SMALL, command
from workers import Nursery


@pytest.fixture(scope="session")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve captions, with an empty line, a duplicate and one outside the vocabulary."""
    path = tmp_path_factory.mktemp("captions") / "captions.txt"
    lines = (REPO / "assets" / "captions.txt").read_text().splitlines()[:11]
    path.write_text("\n".join([*lines, "", f"  {lines[0]} ", "an astronaut riding a horse, 🐎 oil on canvas"]) + "\n")
    return path


@pytest.fixture(scope="session")
def reference(captions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete dataset of four shards, made by one local worker."""
    run = tmp_path_factory.mktemp("reference") / "run"
    done = command("launch/generate.py", "--captions", captions, "--out", run, "--cluster", "local", *SMALL)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Starts workers fast."""
    nursery = Nursery()
    yield nursery
    nursery.close()
