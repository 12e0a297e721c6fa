"""What a sweep would do and cost: `sweep.py --dry-run`."""

from pathlib import Path
from typing import Any

from launch.cluster import ClusterConfig
from launch.grid import Stage, Sweep
from launch.stages import is_done
from stablerep.methods import method_class
from stablerep.runtime.errors import UsageError

IN_NAME = ("data", "train.method")
KEYS = ("captions", "generate", "train")


def describe(sweep: Sweep, out: Path, cluster: ClusterConfig) -> list[str]:
    """The tree of stages (what trains on what, what is scored), how many there are, and GPU hours of what is missing."""
    hints = sweep.spec.get("cost") or {}
    if unknown := set(hints) - set(KEYS):
        raise UsageError(f"unknown key '{min(unknown)}' in cost; it has {', '.join(KEYS)}")
    stages = list(sweep.stages.values())
    hours = {stage.key: gpu_hours(stage, hints) for stage in stages}
    lines = []
    for root in [s for s in stages if not s.needs]:
        lines += _tree(root, sweep, hours, out, "")
    lines.append("")
    for kind in ("real", "generate", "train", "evaluate"):
        found = [s for s in stages if s.kind == kind]
        done = sum(is_done(out, s) for s in found)
        if found:
            shared = {"generate": "images", "train": "train"}.get(kind)
            users = len([c for c in sweep.cells if shared and getattr(c, shared)])
            for_cells = f" for {users} cells" if users > len(found) else ""
            lines.append(f"{kind:<9} {len(found):4} stages{for_cells}, {done} done, {_hours(found, hours, out)}")
    missing = [s for s in stages if not is_done(out, s) and s.kind in ("generate", "train")]
    total = sum(hours[s.key] or 0.0 for s in missing)
    if total:
        gpus = max(1, cluster.gpus_per_node)
        nodes = {kind: max((s.config.nodes for s in stages if s.kind == kind), default=0) for kind in ("generate", "train")}
        asked = ", ".join(f"{kind} on {n} x {gpus} GPUs" for kind, n in nodes.items() if n)
        days = sum((hours[s.key] or 0.0) / (s.config.nodes * gpus) for s in missing) / 24
        lines.append(f"in all about {total:,.0f} GPU hours; one stage after the other, {asked}: {days:,.1f} days")
    lines.append("dry run: nothing was written")
    return lines


def gpu_hours(stage: Stage, hints: dict[str, Any]) -> float | None:
    """GPU hours of a stage from `cost:` (captions; images/s a GPU made; crops/s a GPU trained, by arch); None where unknown."""
    if stage.kind == "generate":
        captions, rate = stage.config.limit or hints.get("captions"), hints.get("generate")
        return captions * stage.config.images_per_caption / rate / 3600 if captions and rate else None
    rate = (hints.get("train") or {}).get(stage.config.arch) if stage.kind == "train" else None
    images = _images_trained(stage.config, hints.get("captions")) if rate else None
    return images / rate / 3600 if images and rate else None


def _images_trained(config: Any, captions: float | None) -> float | None:
    """Crops that a run encodes."""
    method = method_class(config.method)
    crops = len(method.views(config))
    if config.steps:
        return float(crops * config.steps * config.global_batch)
    if not captions:
        return None
    rows = method.rows_per_unit(config.images_per_caption or 1)
    return float(crops * (15.0 if config.epochs is None else config.epochs) * captions * rows)


def _tree(stage: Stage, sweep: Sweep, hours: dict[str, float | None], out: Path, indent: str) -> list[str]:
    below = [s for s in sweep.stages.values() if stage.key in s.needs]
    state = "done" if is_done(out, stage) else f"about {cost:,.0f} GPU h" if (cost := hours[stage.key]) else "missing"
    name = stage.key.rpartition("/")[2] if stage.kind == "evaluate" else stage.key
    axes: dict[str, Any] = next((cell.axes for cell in sweep.cells if cell.train == stage.key), {})
    words = "".join(f" {k.removeprefix('train.')}={v}" for k, v in axes.items() if k not in IN_NAME and "generate." not in k)
    lines = [f"{indent}{name}{words}  {state}{f', for {len(below)}' if len(below) > 1 else ''}"]
    for child in below:
        lines += _tree(child, sweep, hours, out, indent + "  ")
    return lines


def _hours(found: list[Stage], hours: dict[str, float | None], out: Path) -> str:
    left = [s for s in found if not is_done(out, s)]
    known = [h for s in left if (h := hours[s.key]) is not None]
    if not left:
        return "nothing to do"
    return f"{len(left)} to do" + (f", about {sum(known):,.0f} GPU hours" if known else "")
