"""What a sweep would do and cost: `sweep.py --dry-run`."""

import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from generation.captions import prepare
from generation.cost import Estimate
from generation.settings import GenerateConfig, model_here, own_dtype
from launch.cluster import ClusterConfig
from launch.estimate import estimate_on, show_hours, show_money
from launch.grid import Stage, Sweep
from launch.stages import is_done
from stablerep.methods import method_class
from stablerep.plan import EPOCHS
from stablerep.runtime.config import part
from stablerep.runtime.errors import UsageError

IN_NAME = ("data", "train.method")


def describe(sweep: Sweep, out: Path, cluster: ClusterConfig, calibration: str) -> list[str]:
    """The tree of stages (what trains on what, what is scored), how many there are, and GPU hours of what is missing; the
    speeds of generation come from the file `calibration` or a published table, those of training from the YAML."""
    hints = sweep.spec.get("cost") or {}
    stages = list(sweep.stages.values())
    images = {s.key: _images(s.config, hints, cluster, calibration) for s in stages if s.kind == "generate"}
    hours = {s.key: images[s.key].hours if s.key in images else training_hours(s, hints) for s in stages}
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
            lines.append(f"{kind:<9} {len(found):4} stages{for_cells}, {done} done, {_hours(found, hours, images, out)}")
    missing = [s for s in stages if not is_done(out, s) and s.kind in ("generate", "train")]
    total = sum(hours[s.key] or 0.0 for s in missing)
    if total:
        gpus = max(1, cluster.gpus_per_node)
        nodes = {kind: max((s.config.nodes for s in stages if s.kind == kind), default=0) for kind in ("generate", "train")}
        asked = ", ".join(f"{kind} on {n} x {gpus} GPUs" for kind, n in nodes.items() if n)
        wall_h = sum((images[s.key].wall_s or 0.0) / 3600 for s in missing if s.key in images)
        wall_h += sum((hours[s.key] or 0.0) / (s.config.nodes * gpus) for s in missing if s.kind == "train")
        price = cluster.price_per_gpu_hour if cluster.gpus_per_node else None
        money = "" if price is None else f", {show_money(price * total, cluster.currency)}"
        known = "in all" if all(hours[s.key] is not None for s in missing) else "what is known:"
        lines.append(f"{known} about {show_hours(total)} GPU hours{money}; "
                     f"one stage after the other, {asked}: {wall_h / 24:,.1f} days")  # fmt: skip
    lines.append("dry run: nothing was written")
    return lines


def training_hours(stage: Stage, hints: dict[str, Any]) -> float | None:
    """GPU hours of a training stage from `cost:` (captions; crops/s a GPU trained, by arch); None where unknown."""
    rate = (hints.get("train") or {}).get(stage.config.arch) if stage.kind == "train" else None
    images = _images_trained(stage.config, hints.get("captions")) if rate else None
    return images / rate / 3600 if images and rate else None


def _images(config: Any, hints: dict[str, Any], cluster: ClusterConfig, calibration: str) -> Estimate:
    """The cost of a generation stage, as generate.py estimates it; its captions are `limit` or the YAML's number."""
    gpus = cluster.gpus_per_node if config.gpus_per_node is None else config.gpus_per_node
    model = model_here(config.model, config.revision) or config.model
    plain = replace(part(GenerateConfig, config), model=model, dtype=own_dtype(config.dtype, gpus))
    captions = config.limit or hints.get("captions") or _count(tuple(config.captions), config.caption_column)
    jobs = min(config.nodes, -(-int(captions or 1) // (config.captions_per_shard * max(1, gpus))))
    cost = estimate_on(replace(cluster, gpus_per_node=gpus), plain, int(captions or 1), jobs, calibration)
    return cost if captions else replace(cost, hours=None, wall_s=None, source="unknown: no captions here, none in `cost:`")


@functools.cache
def _count(captions: tuple[str, ...], column: str | None) -> int | None:
    """Captions that would be made of these files; None where they are not here."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return prepare(list(captions), column, None, Path(scratch) / "captions.parquet", Path(scratch) / "spill").kept
        except UsageError:
            return None


def _images_trained(config: Any, captions: float | None) -> float | None:
    """Crops of the full size that a run encodes: small ones count by their area. MAE's masks (about half of the work) and the
    passes of teachers (about a third more) are left out."""
    method = method_class(config.method)
    crops = sum((view.size / config.image_size) ** 2 for view in method.views(config))
    if config.steps:
        return float(crops * config.steps * config.global_batch)
    if not captions:
        return None
    rows = method.rows_per_unit(config.images_per_caption or 1)
    return float(crops * (EPOCHS if config.epochs is None else config.epochs) * captions * rows)


def _tree(stage: Stage, sweep: Sweep, hours: dict[str, float | None], out: Path, indent: str) -> list[str]:
    below = [s for s in sweep.stages.values() if stage.key in s.needs]
    state = "done" if is_done(out, stage) else f"about {show_hours(cost)} GPU h" if (cost := hours[stage.key]) else "missing"
    name = stage.key.rpartition("/")[2] if stage.kind == "evaluate" else stage.key
    axes: dict[str, Any] = next((cell.axes for cell in sweep.cells if cell.train == stage.key), {})
    words = "".join(f" {k.removeprefix('train.')}={v}" for k, v in axes.items() if k not in IN_NAME and "generate." not in k)
    lines = [f"{indent}{name}{words}  {state}{f', for {len(below)}' if len(below) > 1 else ''}"]
    for child in below:
        lines += _tree(child, sweep, hours, out, indent + "  ")
    return lines


def _hours(found: list[Stage], hours: dict[str, float | None], images: dict[str, Estimate], out: Path) -> str:
    left = [s for s in found if not is_done(out, s)]
    if not left:
        return "nothing to do"
    known = [h for s in left if (h := hours[s.key]) is not None]
    sources = dict.fromkeys(images[s.key].source for s in left if s.key in images)
    about = f", about {show_hours(sum(known))} GPU hours" if known else ""
    return f"{len(left)} to do{about}" + "".join(f"; GPU hours: {source}" for source in sources)
