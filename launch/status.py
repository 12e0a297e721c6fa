"""Where runs stand, from their files alone: python launch/status.py RUN... [--watch]"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: sys.path[0] is this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.ledger import ledger_lines
from launch.lives import why_it_failed
from launch.progress import Every, Progress, duration, watch
from stablerep.runtime.config import key, parse, run_command
from stablerep.runtime.errors import UsageError
from stablerep.runtime.events import read_events
from stablerep.runtime.rundir import read_json, read_jsonl


@dataclass
class StatusConfig:
    """Which runs."""

    runs: list[str] = key([], "run folders")
    watch: bool = key(False, "stay until the (first) run is complete; Ctrl-C ends it")


def generation_progress(run: Path) -> Progress:
    """Images of committed shards."""
    from generation.plan import finished_shards, load_plan

    plan = load_plan(run)
    shards = finished_shards(run, plan)
    complete = (run / "dataset.json").exists()
    done = plan.images if complete else min(plan.images, shards * plan.captions_per_shard * plan.images_per_caption)
    return Progress(done, plan.images, complete, f"{shards}/{plan.shards} shards")


def training_progress(run: Path) -> Progress:
    """Steps logged so far."""
    if not (run / "train.json").exists():
        return Progress(0, 1, False, "waits for its data")
    total = read_json(run / "train.json")["steps"]
    last: dict[str, float] = {}
    for record in read_jsonl(run / "metrics.jsonl"):
        last = record
    complete = (run / "final" / "encoder.safetensors").exists()
    loss = "not finite" if last.get("loss") is None else f"{last['loss']:.4f}"
    detail = f"loss {loss}  {last['images_per_s']:.0f} images/s" if last else ""
    return Progress(total if complete else int(last.get("step", 0)), total, complete, detail)


def set_aside(run: Path) -> list[str]:
    """One line for every shard that failed, with its last reason."""
    return [
        f"shard {path.stem} failed {len(records)} times: {records[-1]['why']}"
        for path in sorted((run / "failures").glob("*.jsonl"))
        if (records := list(read_jsonl(path)))
    ]


def describe(run: Path) -> list[str]:
    """The state of a run in a few lines."""
    if (run / "sweep.json").exists():
        from launch.overview import sweep_lines

        return sweep_lines(run)
    if (run / "plan.json").exists():
        seen, unit = generation_progress(run), "images"
        commits = [e for e in read_events(run) if e["event"] == "committed"]
        rate = sum(e["images"] for e in commits) / max(1e-9, sum(e["seconds"] for e in commits)) if commits else 0.0
        leases = sorted((run / "leases").glob("*.lease"))
        now = time.time()
        holders = [f"{p.stem} ({now - p.stat().st_mtime:.0f} s)" for p in leases if p.exists()]
        lines = [f"{rate:.2f} images/s a worker, over {len(commits)} shards"] if commits else []
        lines += [f"leases (age of the last heartbeat): {' '.join(holders[:8])}"] if holders and not seen.complete else []
        lines += set_aside(run)
    elif (run / "config.yaml").exists():
        seen, unit = training_progress(run), "steps"
        lines = [seen.detail] if seen.detail else []
        checkpoints = sorted((run / "checkpoints").glob("step-*"))
        lines += [f"newest checkpoint {checkpoints[-1].name}"] if checkpoints else []
        lines += ledger_lines(run)
        lines += [why] if not seen.complete and (why := why_it_failed(run)) else []
    else:
        raise UsageError(f"{run} is not a run: it has none of sweep.json, plan.json and config.yaml")
    events = list(read_events(run))
    counts = {k: sum(e["event"] == k for e in events) for k in ("requeued", "failed", "taken over")}
    counts["taken over"] = sum(e.get("how") == "taken over" for e in events)
    lines += [", ".join(f"{v} {k}" for k, v in counts.items() if v)] if any(counts.values()) else []
    if events and not seen.complete:
        last = max(events, key=lambda e: e["time"])
        lines.append(f"last event {duration(max(0, time.time() - last['time']))} ago: {last['process']} {last['event']}")
    state = "complete" if seen.complete else f"{100 * seen.done / max(1, seen.total):.1f} %"
    return [f"{run}: {state}, {seen.done}/{seen.total} {unit}", *(f"  {line}" for line in lines)]


def progress_of(run: Path) -> tuple[Progress, str, str]:
    """Where a run stands, its unit, and the name of its jobs ("" where they are those of a sweep's stages)."""
    if (run / "sweep.json").exists():
        from launch.overview import sweep_progress

        return sweep_progress(run), "stages", ""
    if (run / "plan.json").exists():
        return generation_progress(run), "images", "generate"
    return training_progress(run), "steps", "train"


def main(argv: list[str]) -> int:
    """Print the state; 0 where all runs are complete, 3 where one is not."""
    config = parse(StatusConfig, argv, prog="status.py", about="Where runs stand, from files alone.", positional="runs")
    if not config.runs:
        raise UsageError("which run? python launch/status.py RUN")
    runs = [Path(r) for r in config.runs]
    for run in runs:
        print("\n".join(describe(run)))
    if config.watch:
        from launch.cluster import nudge
        from launch.overview import nudge_sweep

        run, (_, unit, name) = runs[0], progress_of(runs[0])
        end_waits = Every(5.0, lambda: nudge(run, name) if name else nudge_sweep(run))
        watch(lambda: progress_of(run)[0], end_waits, unit, until_idle=False)
    return 0 if all(progress_of(r)[0].complete for r in runs) else 3


if __name__ == "__main__":
    run_command(main)
