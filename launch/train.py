"""Images to an encoder: python launch/train.py --data RUN... --out RUN"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: sys.path[0] is this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.options import LaunchConfig
from stablerep.runtime.config import key, parse, part, run_command
from stablerep.runtime.errors import UsageError
from stablerep.train_config import TrainConfig

ABOUT = "Submit training (one process a GPU), resume where RUN exists."
JOB = "train"


@dataclass
class TrainCommand(LaunchConfig, TrainConfig):
    """All flags of train.py."""

    after: list[str] = key([], "Slurm: ids of jobs that make the data; it is looked at when they have ended")
    drill: bool = key(False, "instead: a short run that is requeued, warned and killed on this cluster, and a verdict")


def main(argv: list[str]) -> int:
    """Freeze data and config, submit one job, wait if asked."""
    command = parse(TrainCommand, argv, prog="train.py", about=ABOUT)
    if not command.out:
        raise UsageError("--out RUN is missing: the folder that the run goes to")
    if command.drill:
        return _drill(command)
    from launch.cluster import Shape, load_cluster, render_scripts, still_active, submit
    from launch.job import TrainTask
    from stablerep.plan import freeze, freeze_config, try_out

    config = part(TrainConfig, command)
    cluster = load_cluster(command.cluster, command.gpus_per_node)
    run = Path(config.out).resolve()
    config.data = [str(Path(d).resolve()) for d in config.data]
    gpus, local = cluster.gpus_per_node, cluster.kind == "local"
    ranks = command.nodes * max(1, gpus)
    if (run / "final" / "encoder.safetensors").exists():
        try_out(config, run, ranks)
        print(f"{run}: complete, nothing to do")
        return 0
    if command.after and (local or command.dry_run):
        raise UsageError("--after needs a Slurm cluster, and cannot be tried out: the data is not there yet")
    fresh = not run.exists()
    if command.after:
        freeze_config(config, run)
        print(f"plan: made when job {' '.join(command.after)} has ended, on {ranks} ranks")
    else:
        planned = (try_out if command.dry_run else freeze)(config, run, ranks)
        print(
            f"plan: {planned.steps} steps of {config.global_batch} images on {ranks} ranks, "
            f"{planned.order.steps_per_epoch} steps an epoch"
        )
    again = [sys.executable, "-m", "launch.requeue", str(run)]
    shape = Shape(JOB, 1 if local else command.nodes, ranks if local else max(1, gpus), gpus, again, command.after)
    if command.dry_run:
        for script in render_scripts(cluster, run, shape, 1):
            print(script)
        print("dry run: nothing was written")
        return 0
    if still_active(run, JOB):
        print("the job is already queued or running")
    else:
        task = TrainTask(str(run), gpus, int(time.time()), cluster.signal_lead_s, cluster.scratch)
        print(f"submitted job {submit(cluster, run, shape, [task], fresh)[0]}")
    wait = command.wait if command.wait is not None else local
    if not wait:
        print(f"follow it with: python launch/status.py {os.path.relpath(run)} --watch")
        return 0
    return _wait(run)


def _drill(command: TrainCommand) -> int:
    """0 where all claims of the drill hold here, 1 where one does not."""
    from launch.cluster import load_cluster
    from launch.drill import run_drill

    where = ["--cluster", command.cluster, "--nodes", str(command.nodes)]
    if command.gpus_per_node is not None:
        where += ["--gpus-per-node", str(command.gpus_per_node)]
    cluster = load_cluster(command.cluster, command.gpus_per_node)
    data = [str(Path(d).resolve()) for d in command.data]
    ranks = command.nodes * max(1, cluster.gpus_per_node)
    return 0 if run_drill(Path(command.out).resolve(), data, cluster, where, ranks, command.steps or 600) else 1


def _wait(run: Path) -> int:
    from launch.cluster import watch_jobs
    from launch.ledger import ledger_lines
    from launch.lives import why_it_failed
    from launch.progress import Every, watch
    from launch.status import training_progress

    try:
        complete = watch(lambda: training_progress(run), Every(5.0, lambda: watch_jobs(run, JOB)), "steps")
    except KeyboardInterrupt:
        print(f"\ndetached; the work goes on. See: python launch/status.py {run}")
        return 3
    print("\n".join(ledger_lines(run)))
    if complete:
        print(f"{run}: complete")
        return 0
    reason = why_it_failed(run)
    print(
        f"error: {run} is incomplete and no job is left{f' ({reason})' if reason else ''}; {run}/logs says more, "
        "the same command resumes", file=sys.stderr
    )  # fmt: skip
    return 3


if __name__ == "__main__":
    run_command(main)
