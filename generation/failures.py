"""Failed attempts at shards, in RUN/failures: the kind, the node, why.

A node gives a shard up that failed there `attempts` times, or on `attempts` different nodes. So one bad node withholds nothing
from the others, and where there is one node its attempts count. What is given up and nobody at work will take is set aside,
until the failures are forgotten.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stablerep.data.shards import shard_name
from stablerep.runtime.rundir import append_jsonl, read_jsonl


def failures(run: Path, shard: int) -> list[dict[str, Any]]:
    """The failed attempts at a shard that were not forgotten."""
    return list(read_jsonl(_file(run, shard)))


def failed_shards(run: Path) -> set[int]:
    """The shards with failed attempts that were not forgotten (one listing of a folder that seldom exists)."""
    return {int(path.stem) for path in (run / "failures").glob("*.jsonl")}


def record(run: Path, shard: int, **fields: Any) -> None:
    """Add a failed attempt."""
    append_jsonl(_file(run, shard), fields)


def given_up(records: list[dict[str, Any]], attempts: int, node: str | None = None) -> bool:
    """Whether `node` will not try a shard with these failures again; without a node: whether any will not."""
    times = Counter(r.get("node") for r in records)
    here = max(times.values(), default=0) if node is None else times[node]
    return here >= attempts or len(times) >= attempts


def set_aside(run: Path, attempts: int, at_work: Iterable[str] = ()) -> dict[int, list[dict[str, Any]]]:
    """The failures of every shard, not committed, that a node gave up, and with it all nodes that are `at_work`."""
    nodes = [None, *set(at_work)]
    absent = {
        k: failures(run, k) for k in sorted(failed_shards(run)) if not (run / "shards" / f"{shard_name(k)}.json").exists()
    }
    return {k: records for k, records in absent.items() if all(given_up(records, attempts, node) for node in nodes)}


def forget(run: Path) -> None:
    """Give every shard that failed new attempts; what happened stays in `*.before`."""
    for path in (run / "failures").glob("*.jsonl"):
        with open(path.with_suffix(".before"), "a") as kept:
            kept.write(path.read_text())
        path.unlink()


def _file(run: Path, shard: int) -> Path:
    return run / "failures" / f"{shard_name(shard)}.jsonl"
