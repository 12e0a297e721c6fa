"""Captions to images: python launch/generate.py --captions FILE --out RUN"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: sys.path[0] is this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from generation.settings import GenerateConfig
from launch.options import LaunchConfig
from stablerep.runtime.config import parse, part, run_command
from stablerep.runtime.errors import UsageError

ABOUT = "Plan the shards, submit the generation array, resume where RUN exists."
JOB = "generate"


@dataclass
class GenerateCommand(LaunchConfig, GenerateConfig):
    """All flags of generate.py."""


def main(argv: list[str]) -> int:
    """Plan or resume, submit what is missing, wait if asked; see the exit codes in the README."""
    command = parse(GenerateCommand, argv, prog="generate.py", about=ABOUT)
    if command.nodes < 1:
        raise UsageError("--nodes must be at least 1")
    from generation.plan import check_folder, check_resume, load_plan, make_plan, renew
    from generation.settings import resolve
    from launch.cluster import Shape, load_cluster, render_scripts, still_active, submit
    from launch.job import GenerateTask

    cluster = load_cluster(command.cluster, command.gpus_per_node)
    gpus = cluster.gpus_per_node
    config = resolve(part(GenerateConfig, command), gpus)
    run = Path(config.out).resolve()
    fresh = not run.exists()
    if (run / "plan.json").exists():
        check_resume(config)
        plan = load_plan(run)
        print(f"{run}: resuming, {plan.captions} captions, {plan.images} images, {plan.shards} shards")
    else:
        check_folder(run)
        plan, counts = make_plan(config, write=not command.dry_run)
        print(f"captions: {counts.lines} lines, {counts.empty} empty and {counts.duplicates} duplicates dropped, "
              f"{counts.kept} kept")  # fmt: skip
        print(f"plan: {plan.images} images in {plan.shards} shards, about {plan.megabytes:.0f} MB, {config.dtype}")
    if (run / "dataset.json").exists():
        print(f"{run}: complete, nothing to do")
        return 0

    tasks_per_node = max(1, gpus)
    shape = Shape(JOB, tasks_per_node=tasks_per_node, gpus_per_node=gpus)
    wanted = min(command.nodes, -(-plan.shards // tasks_per_node))
    if command.dry_run:
        scripts = render_scripts(cluster, run, shape, wanted)
        for script in scripts:
            print(script)
        print(f"dry run: {wanted} jobs of one node in {len(scripts) or wanted} submissions; nothing was written")
        return 0
    active = still_active(run, JOB)
    missing = max(0, wanted - len(active))
    started = time.time()
    if missing:
        renew(config)
        _forget_failures(run)
        ids = submit(cluster, run, shape, [GenerateTask(str(run), gpus) for _ in range(missing)], fresh)
        print(f"submitted {len(ids)} jobs: {' '.join(ids[:4])}{' ...' if len(ids) > 4 else ''}")
    else:
        print(f"{len(active)} jobs are already queued or running")
    wait = command.wait if command.wait is not None else cluster.kind == "local"
    if not wait:
        print(f"follow it with: python launch/status.py {os.path.relpath(run)} --watch")
        return 0
    return _wait(run, started)


def _wait(run: Path, started: float) -> int:
    """Show progress to the end; where no job is left, say why from the events since `started` (Unix time)."""
    from launch.cluster import watch_jobs
    from launch.progress import Every, watch
    from launch.status import generation_progress
    from stablerep.runtime.events import read_events

    try:
        complete = watch(lambda: generation_progress(run), Every(5.0, lambda: watch_jobs(run, JOB)), "images")
    except KeyboardInterrupt:
        print(f"\ndetached; the work goes on. See: python launch/status.py {run}")
        return 3
    if complete:
        print(f"{run}: complete")
        return 0
    failed = [e for e in read_events(run) if e["event"] == "failed" and e["time"] >= started]
    for why in sorted({f"shard {e['shard']}: {e['why']}" if "shard" in e else e["why"] for e in failed}):
        print(why, file=sys.stderr)
    print(f"error: {run} is incomplete and no job is left; see {run}/logs; the same command resumes", file=sys.stderr)
    return 3


def _forget_failures(run: Path) -> None:
    """A new launch gives shards that were set aside new attempts."""
    for path in (run / "failures").glob("*.jsonl"):
        path.rename(path.with_suffix(".before"))


if __name__ == "__main__":
    run_command(main)
