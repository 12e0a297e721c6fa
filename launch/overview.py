"""Where a sweep stands, from its files (and, where there is one, Slurm's queue): for status.py."""

from collections import Counter
from pathlib import Path
from typing import Any

from launch import slurm
from launch.cluster import all_active
from launch.lives import why_it_failed
from launch.progress import Progress
from launch.stages import MARKS, has_result, last_events, work_of
from stablerep.runtime.errors import WorkError
from stablerep.runtime.events import read_events
from stablerep.runtime.rundir import read_json

STATES = ("done", "running", "queued", "failed", "left")


def sweep_lines(out: Path) -> list[str]:
    """Counts of stages by kind and state; what runs, with its progress; what failed, with its reason."""
    keys = [stage["key"] for stage in read_json(out / "sweep.json")["stages"]]
    works = list(dict.fromkeys(map(work_of, keys)))
    notes: list[str] = []
    try:
        active = all_active({out / key: key.partition("/")[0] for key in works})
    except WorkError as error:
        active, notes = {}, [str(error)]
    events = last_events(out)
    found = {key: _state(out, key, active.get(out / work_of(key), []), events.get(work_of(key), {})) for key in keys}
    lines = [f"{out}: {sum(f[0] == 'done' for f in found.values())}/{len(keys)} stages done", *notes]
    for kind in MARKS:
        counts = Counter(state for key, (state, _) in found.items() if key.startswith(f"{kind}/"))
        if counts:
            lines.append(f"  {kind:<9} " + ", ".join(f"{counts[s]} {s}" for s in STATES if counts[s]))
    for state in ("running", "failed"):
        shown = {work_of(key): why for key, (now, why) in found.items() if now == state}
        lines += [f"  {state}: {key}  {why}".rstrip() for key, why in shown.items()]
    return lines


def _state(out: Path, key: str, active: list[str], event: dict[str, Any]) -> tuple[str, str]:
    """(one of STATES, its detail) of a stage with these jobs and this last event of its sweep."""
    run, kind = out / work_of(key), key.partition("/")[0]
    if has_result(out, key):
        return "done", ""
    if active and kind != "evaluate" and not any(True for _ in read_events(run)):
        return "queued", ""
    if active or (event.get("event") == "started" and Path(f"/proc/{event['pid']}").exists()):
        return "running", _progress(run, kind)
    if event.get("event") == "failed":
        return "failed", event["why"]
    if (run / "jobs.jsonl").exists() and event.get("event") != "stopped":
        return "failed", why_it_failed(run) or f"no job is left; {run}/logs says more"
    return "left", ""


def _progress(run: Path, kind: str) -> str:
    from launch.status import generation_progress, training_progress

    if kind == "generate" and (run / "plan.json").exists():
        seen = generation_progress(run)
    elif kind == "train" and (run / "config.yaml").exists():
        seen = training_progress(run)
    else:
        return ""
    return f"{seen.done}/{seen.total} {'images' if kind == 'generate' else 'steps'}  {seen.detail}".rstrip()


def sweep_progress(out: Path) -> Progress:
    """Stages whose result is there."""
    keys = [stage["key"] for stage in read_json(out / "sweep.json")["stages"]]
    done = sum(has_result(out, key) for key in keys)
    return Progress(done, len(keys), done == len(keys))


def nudge_sweep(out: Path) -> None:
    """End the wait that Slurm puts before requeued jobs of the sweep."""
    works = {work_of(stage["key"]) for stage in read_json(out / "sweep.json")["stages"]}
    jobs = [job for found in all_active({out / key: key.partition("/")[0] for key in works}).values() for job in found]
    if jobs:
        slurm.nudge(jobs)
