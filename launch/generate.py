"""Captions to images: python launch/generate.py --captions FILE --out RUN"""

import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: sys.path[0] is this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from generation.cost import CALIBRATION
from generation.settings import GenerateConfig
from launch.options import LaunchConfig
from stablerep.runtime.config import key, parse, part, run_command
from stablerep.runtime.errors import UsageError, WorkError

if TYPE_CHECKING:
    from generation.cost import Estimate
    from generation.plan import Plan

ABOUT = "Plan the shards, submit the generation array, resume where RUN exists."
JOB = "generate"
CLEAR_S = 60.0  # for jobs of a complete run to end


@dataclass
class GenerateCommand(LaunchConfig, GenerateConfig):
    """All flags of generate.py."""

    max_running: int | None = key(None, "of the submitted jobs, run at most so many at once")
    stop: bool = key(False, "instead: workers finish their batch, give their shards back and end; waiting jobs are cancelled")
    calibrate: bool = key(
        False, "instead: measure images/s of these settings on one device, in two minutes, for later estimates"
    )
    calibration: str = key(CALIBRATION, "the file of measured speeds that estimates use and --calibrate adds to")
    retry_failed: bool = key(
        False, "give the shards that were set aside new attempts; without such a shard nothing is launched"
    )


def main(argv: list[str]) -> int:
    """Plan or resume, submit what is missing, wait if asked; see the exit codes in the README."""
    command = parse(GenerateCommand, argv, prog="generate.py", about=ABOUT)
    if command.nodes < 1:
        raise UsageError("--nodes must be at least 1")
    if command.max_running is not None and command.max_running < 1:
        raise UsageError("--max-running must be at least 1")
    if command.stop:
        return _stop(command)
    if command.calibrate:
        return _calibrate(command)
    from generation.plan import check_folder, check_resume, finished_shards, load_plan, make_plan, renew
    from generation.settings import resolve
    from launch.cluster import Shape, load_cluster, render_scripts, still_active, submit
    from launch.estimate import estimate_lines, estimate_on, plan_entry
    from launch.job import GenerateTask

    cluster = load_cluster(command.cluster, command.gpus_per_node)
    gpus = cluster.gpus_per_node
    config = resolve(part(GenerateConfig, command), gpus)
    run = Path(config.out).resolve()
    fresh = not run.exists()
    tasks_per_node = max(1, gpus)

    def jobs_for(shards: int) -> int:
        wanted = min(command.nodes, -(-shards // tasks_per_node))
        return min(wanted, command.max_running or wanted) if cluster.kind == "local" else wanted  # nothing waits here

    def cost_of(captions: int) -> "Estimate":
        jobs = jobs_for(-(-captions // config.captions_per_shard))
        return estimate_on(cluster, config, captions, min(jobs, command.max_running or jobs), command.calibration)

    if (run / "plan.json").exists():
        check_resume(config)
        plan = load_plan(run)
        print(f"{run}: resuming, {plan.captions} captions, {plan.images} images, {plan.shards} shards")
    else:
        check_folder(run)
        plan, counts = make_plan(config, not command.dry_run, lambda made: plan_entry(cost_of(made.captions)))
        print(f"captions: {counts.lines} lines, {counts.empty} empty and {counts.duplicates} duplicates dropped, "
              f"{counts.kept} kept")  # fmt: skip
        print(f"plan: {plan.captions} captions, {plan.images} images in {plan.shards} shards, "
              f"about {plan.megabytes / 1e3:,.3f} GB on disk, {config.dtype}")  # fmt: skip
    if (run / "dataset.json").exists():
        print(f"{run}: complete, nothing to do")
        return 0

    shards_left = plan.shards - finished_shards(run, plan)
    left = min(plan.captions, shards_left * plan.captions_per_shard)
    print("\n".join(estimate_lines(cost_of(left), gpus > 0)))
    shape = Shape(JOB, tasks_per_node=tasks_per_node, gpus_per_node=gpus, at_most=command.max_running)
    wanted = jobs_for(max(1, shards_left))  # one where all that is left is torn, or dataset.json
    if command.dry_run:
        scripts = render_scripts(cluster, run, shape, wanted)
        for script in scripts:
            print(script)
        print(f"dry run: {wanted} jobs of one node in {len(scripts) or wanted} submissions; nothing was written")
        return 0
    active = still_active(run, JOB)
    nothing = _make_way(run, plan, command.retry_failed, config.attempts, active)
    if nothing is not None:
        return nothing
    missing = max(0, wanted - len(active))
    started = time.time()
    if missing:
        renew(config)
        ids = submit(cluster, run, shape, [GenerateTask(str(run), gpus, cluster.scratch)] * missing, fresh)
        print(f"submitted {len(ids)} jobs: {' '.join(ids[:4])}{' ...' if len(ids) > 4 else ''}")
    else:
        print(f"{len(active)} jobs are already queued or running")
    wait = command.wait if command.wait is not None else cluster.kind == "local"
    if not wait:
        print(f"follow it with: python launch/status.py {os.path.relpath(run)} --watch")
        return 0
    return _wait(run, config.attempts, started)


def _make_way(run: Path, plan: "Plan", retry_failed: bool, attempts: int, active: list[str]) -> int | None:
    """Before a launch: take STOP away, and give shards new attempts where asked; the exit code where nothing is to launch."""
    from generation.failures import forget, set_aside
    from generation.plan import finished_shards
    from generation.worker import STOP

    if (run / STOP).exists():
        if active:
            raise WorkError(
                f"{run} was told to stop and {len(active)} jobs are ending; give the command again when they are gone"
            )
        (run / STOP).unlink()
    aside = len(set_aside(run, attempts))
    if not retry_failed:
        if aside and not active and finished_shards(run, plan) + aside == plan.shards:
            print(f"error: {_aside(aside)}, and no other is left to make", file=sys.stderr)
            return 3
        return None
    if not aside:
        print(f"{run}: no shard was set aside, nothing is launched")
        return 0
    if active:
        raise WorkError(f"{len(active)} jobs of {run} are at work; give --retry-failed when they have ended")
    print(f"{aside} shards that were set aside get new attempts")
    forget(run)
    return None


def _calibrate(command: GenerateCommand) -> int:
    """Measure on one device and remember it."""
    from generation.settings import resolve
    from launch.calibrate import calibrate
    from launch.cluster import load_cluster

    cluster = load_cluster(command.cluster, command.gpus_per_node)
    command.out = command.out or "nowhere"  # nothing is generated
    config = resolve(part(GenerateConfig, command), cluster.gpus_per_node)
    path = Path(command.calibration).expanduser()
    print(calibrate(config, cluster, path))
    print(f"remembered in {path}")
    return 0


def _stop(command: GenerateCommand) -> int:
    """Leave the file STOP for the workers, cancel what waits in the queue; with --wait, stay until no job is left."""
    from generation.plan import load_plan
    from generation.worker import STOP
    from launch.cluster import cancel_waiting, still_active
    from stablerep.runtime.rundir import write_atomic

    run = Path(command.out).resolve()
    load_plan(run)
    if (run / "dataset.json").exists():
        print(f"{run}: complete, nothing to stop")
        return 0
    write_atomic(run / STOP, "the workers of this run end; the next launch removes this file\n")
    cancel_waiting(run, JOB)
    print(f"{run}: workers end after the batch that they are at; the same generate command without --stop goes on")
    while command.wait and still_active(run, JOB):
        time.sleep(1.0)
    return 0


def _wait(run: Path, attempts: int, started: float) -> int:
    """Show progress to the end; where no job is left, say why from the events since `started` (Unix time)."""
    from generation.failures import set_aside
    from generation.worker import STOP
    from launch.cluster import watch_jobs
    from launch.estimate import compare_lines
    from launch.generation_status import WatchedProgress, read_status
    from launch.progress import Every, watch
    from stablerep.runtime.events import read_events

    try:
        complete = watch(WatchedProgress(run), Every(5.0, lambda: watch_jobs(run, JOB)), "images")
        if complete:
            _clear_away(run)
    except KeyboardInterrupt:
        print(f"\ndetached; the work goes on. See: python launch/status.py {run}")
        return 3
    if complete:
        print("\n".join([f"{run}: complete", *(f"  {line}" for line in compare_lines(run, read_status(run)))]))
        return 0
    aside = set_aside(run, attempts)
    failed = [e for e in read_events(run) if e["event"] == "failed" and e["time"] >= started]
    said = {f"shard {e['shard']:06d}: {e['why']}" if "shard" in e else e["why"] for e in failed}
    said |= {f"shard {k:06d}: {records[-1]['why']}" for k, records in aside.items()}
    for why in sorted(said):
        print(why, file=sys.stderr)
    if (run / STOP).exists():
        print(f"{run}: stopped; the same command goes on")
        return 3
    then = _aside(len(aside)) if aside else "the same command resumes"
    print(f"error: {run} is incomplete and no job is left; see {run}/logs; {then}", file=sys.stderr)
    return 3


def _clear_away(run: Path) -> None:
    """At the end of a run: jobs that never began are cancelled, the others end by themselves. No later command meets them."""
    from launch.cluster import cancel_waiting, still_active

    end = time.monotonic() + CLEAR_S
    with suppress(WorkError):  # Slurm does not answer: the images are there all the same
        cancel_waiting(run, JOB)
        while still_active(run, JOB) and time.monotonic() < end:
            time.sleep(0.5)


def _aside(count: int) -> str:
    return f"{count} shards are set aside; the same command with --retry-failed tries them again"


if __name__ == "__main__":
    run_command(main)
