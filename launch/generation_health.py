"""What status says of a generation run's faults and of its shards' quality."""

from collections import Counter
from typing import Any

from generation.quality import medians, outliers

NODES, SHARDS = 4, 8  # named at most
WORDS = {
    "black": "black images",
    "constant": "images of one colour",
    "retried": "images made again in float32",
    "distance": "mean distance of a caption's images",
    "jpeg_bytes": "bytes a JPEG",
}


def nodes_of(records: list[dict[str, Any]]) -> list[str]:
    """The nodes that failed attempts were made on."""
    return sorted({str(r.get("node", "?")) for r in records})


def quality_summary(quality: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Medians and outliers of the shards' numbers, for `--json`."""
    names = ("shard", "what", "value", "median")
    found = [dict(zip(names, outlier, strict=True)) for outlier in outliers(quality)]
    return {"median": medians(quality), "outliers": found}


def describe_health(faults: dict[str, Counter[str]], quality: dict[int, dict[str, Any]]) -> list[str]:
    """A line for each kind of fault with the nodes that had most of it, the medians, a line for each outlier."""
    lines = [f"faults of kind {kind}: {nodes.total()} ({_most(nodes)})" for kind, nodes in sorted(faults.items())]
    middle = medians(quality)
    if middle:
        said = ", ".join(f"{_number(name, value)} {WORDS[name]}" for name, value in middle.items())
        lines.append(f"quality, median of the shards: {said}")
    found = outliers(quality)
    for shard, name, value, median in found[:SHARDS]:
        lines.append(f"shard {shard:06d} is out of line: {_number(name, value)} {WORDS[name]}, median {_number(name, median)}")
    return lines + ([f"... and {len(found) - SHARDS} more outliers: --json"] if len(found) > SHARDS else [])


def _most(nodes: Counter[str]) -> str:
    named = [f"{count} on {node}" for node, count in nodes.most_common(NODES)]
    return ", ".join([*named, f"{len(nodes) - NODES} more nodes"] if len(nodes) > NODES else named)


def _number(name: str, value: float) -> str:
    if name == "jpeg_bytes":
        return f"{value:.0f}"
    return f"{value:.3f}" if name == "distance" else f"{100 * value:.1f} %"
