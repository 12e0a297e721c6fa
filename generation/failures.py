"""Failed attempts at shards, in RUN/failures. With `attempts` of them a shard is set aside, until they are forgotten."""

from pathlib import Path
from typing import Any

from stablerep.data.shards import shard_name
from stablerep.runtime.rundir import append_jsonl, read_jsonl


def failures(run: Path, shard: int) -> list[dict[str, Any]]:
    """The failed attempts at a shard that were not forgotten."""
    return list(read_jsonl(_file(run, shard)))


def record(run: Path, shard: int, **fields: Any) -> None:
    """Add a failed attempt."""
    append_jsonl(_file(run, shard), fields)


def set_aside(run: Path, attempts: int) -> dict[int, list[dict[str, Any]]]:
    """The failures of every shard that was given up: not committed, and failed `attempts` times or more."""
    numbers = sorted(int(path.stem) for path in (run / "failures").glob("*.jsonl"))
    absent = [k for k in numbers if not (run / "shards" / f"{shard_name(k)}.json").exists()]
    return {k: records for k in absent if len(records := failures(run, k)) >= attempts}


def forget(run: Path) -> None:
    """Give every shard that failed new attempts; what happened stays in `*.before`."""
    for path in (run / "failures").glob("*.jsonl"):
        with open(path.with_suffix(".before"), "a") as kept:
            kept.write(path.read_text())
        path.unlink()


def _file(run: Path, shard: int) -> Path:
    return run / "failures" / f"{shard_name(shard)}.jsonl"
