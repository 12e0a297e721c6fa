"""Where runs stand, from their files alone: python launch/status.py RUN... [--watch]"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: sys.path[0] is this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.generation_status import (
    GenerationStatus,
    WatchedProgress,
    describe_generation,
    generation_progress,
    read_status,
)
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
    json: bool = key(False, "one JSON object a line for each run, in place of the text")
    pictures: bool = key(False, "also write a contact sheet of the latest images of generation runs, RUN/contact.png")


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


def describe(run: Path, generation: GenerationStatus | None) -> list[str]:
    """The state of a run in a few lines; of a generation run as it was read."""
    if (run / "sweep.json").exists():
        from launch.overview import sweep_lines

        return sweep_lines(run)
    if generation is not None:
        return describe_generation(run, generation)
    seen, unit, _ = progress_of(run)
    lines = [seen.detail] if seen.detail else []
    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    lines += [f"newest checkpoint {checkpoints[-1].name}"] if checkpoints else []
    lines += ledger_lines(run)
    lines += [why] if not seen.complete and (why := why_it_failed(run)) else []
    events = list(read_events(run))
    counts = {k: sum(e["event"] == k for e in events) for k in ("requeued", "failed")}
    lines += [", ".join(f"{v} {k}" for k, v in counts.items() if v)] if any(counts.values()) else []
    if events and not seen.complete:
        last = max(events, key=lambda e: e["time"])
        lines.append(f"last event {duration(max(0, time.time() - last['time']))} ago: {last['process']} {last['event']}")
    state = "complete" if seen.complete else f"{100 * seen.done / max(1, seen.total):.1f} %"
    return [f"{run}: {state}, {seen.done}/{seen.total} {unit}", *(f"  {line}" for line in lines)]


def progress_of(run: Path) -> tuple[Progress, str, str]:
    """Where a run stands, its unit, and the name of its jobs ("" for a sweep, whose stages have theirs). Raises UsageError."""
    if (run / "sweep.json").exists():
        from launch.overview import sweep_progress

        return sweep_progress(run), "stages", ""
    if (run / "plan.json").exists():
        return generation_progress(run), "images", "generate"
    if (run / "config.yaml").exists():
        return training_progress(run), "steps", "train"
    raise UsageError(f"{run} is not a run: it has none of sweep.json, plan.json and config.yaml")


def to_dict(run: Path, generation: GenerationStatus | None) -> dict[str, Any]:
    """The state of a run as plain values; of a generation run as it was read. Raises UsageError."""
    if generation is not None:
        return {"run": str(run), **generation.to_dict()}
    seen, unit, _ = progress_of(run)
    state = {"run": str(run), "kind": "training" if unit == "steps" else "sweep", **asdict(seen)}
    return {**state, "why": why_it_failed(run)} if unit == "steps" else state


def _complete(run: Path) -> bool:
    """By the files that are written last."""
    if (run / "sweep.json").exists():
        return progress_of(run)[0].complete
    return (run / "dataset.json").exists() or (run / "final" / "encoder.safetensors").exists()


def main(argv: list[str]) -> int:
    """Print the state; 0 where all runs are complete, 3 where one is not."""
    config = parse(StatusConfig, argv, prog="status.py", about="Where runs stand, from files alone.", positional="runs")
    if not config.runs:
        raise UsageError("which run? python launch/status.py RUN")
    runs = [Path(r) for r in config.runs]
    if config.json and config.watch:
        raise UsageError("--json or --watch, not both")
    for run in runs:
        state = read_status(run) if (run / "plan.json").exists() else None
        print(json.dumps(to_dict(run, state), ensure_ascii=False) if config.json else "\n".join(describe(run, state)))
        if config.pictures and state is not None:
            from launch.contact import contact_sheet

            print(f"  pictures: {contact_sheet(run, state.newest)}", file=sys.stderr)
    if config.watch:
        from launch.cluster import nudge
        from launch.overview import nudge_sweep

        run, (_, unit, name) = runs[0], progress_of(runs[0])
        end_waits = Every(5.0, lambda: nudge(run, name) if name else nudge_sweep(run))
        look = WatchedProgress(run) if unit == "images" else lambda: progress_of(run)[0]
        watch(look, end_waits, unit, until_idle=False)
    return 0 if all(_complete(r) for r in runs) else 3


if __name__ == "__main__":
    run_command(main)
