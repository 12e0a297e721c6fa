"""Coming back: a job asks Slurm to run it again, under the same id, within a budget of lives without progress.

`python -m launch.requeue RUN CODE` is what a training job's batch script runs when srun failed: no rank is left to ask.
"""

import os
import signal
import sys
from pathlib import Path

from generation.settings import GenerateConfig
from launch import slurm
from launch.lives import Life, read_lives, without_progress
from stablerep.runtime.config import from_yaml
from stablerep.runtime.errors import WorkError
from stablerep.runtime.events import Events, process_name, read_events
from stablerep.runtime.rundir import read_json
from stablerep.train_config import TrainConfig


def requeue_self(events: Events, signal_name: str | None, exclude: list[str] | None = None) -> None:
    """Ask Slurm to run this job (of an array: this element) again after `signal_name`; nothing outside Slurm.

    A job that got TERM and no longer runs was cancelled by its user, or Slurm requeues it by itself: it is left alone.
    `exclude` names nodes that it must not get again. Raises WorkError where Slurm refuses.
    """
    job = slurm.own_job()
    if job is None:
        return
    if signal_name == "SIGTERM" and slurm.state(job) != "RUNNING":
        events.write("not requeued", job=job, why="cancelled, or requeued by Slurm itself")
        return
    events.write("requeued", job=job, **({"exclude": exclude} if exclude else {}))
    result = slurm.patient_client("scontrol", "requeue", job)
    if result.returncode not in (0, -signal.SIGTERM):
        events.write("failed", why=f"scontrol requeue {job}: {result.stderr.strip()}")
        raise WorkError(f"cannot requeue {job} ({result.stderr.strip()}); give the same command again")
    if exclude and (refused := slurm.exclude_nodes(job, exclude)):
        events.write("failed", why=f"{job} may get {' '.join(exclude)} again: {refused}")


def requeue_elsewhere(run: Path, events: Events, signal_name: str | None, node: str) -> None:
    """`requeue_self` for a generation job whose GPU broke, kept off this node from now on; nothing outside Slurm.

    Raises WorkError where it has left as many nodes as a shard has attempts: then the GPUs are not what is broken.
    """
    job = slurm.own_job()
    if job is None:
        return
    allowed = from_yaml(GenerateConfig, run / "config.yaml").attempts
    moves = [e for e in read_events(run) if e["event"] == "requeued" and e.get("job") == job]
    left = {name for e in moves for name in e.get("exclude", [])} - {node}
    if len(left) >= allowed:
        why = f"job {job} met a broken GPU on {', '.join(sorted(left | {node}))}: it is not requeued; look at {run}/failures"
        events.write("not requeued", job=job, why=why)
        raise WorkError(why)
    requeue_self(events, signal_name, [node])


def check_budget(run: Path, job: str, beginning: str | None = None) -> None:
    """Raise WorkError where the last lives of this job all left no newer checkpoint than they found.

    `beginning` is a life that has only just begun and is not counted.
    """
    allowed = from_yaml(TrainConfig, run / "config.yaml").restarts_without_progress
    spent = without_progress([life for life in read_lives(read_events(run)) if life.name != beginning], job)
    if spent >= allowed:
        raise WorkError(
            f"{spent} lives of job {job} in a row made no progress (--restarts-without-progress {allowed}): "
            "it is not requeued; find out why before you give the same command again"
        )


def requeue_training(run: Path, events: Events, signal_name: str | None, exclude: list[str] | None = None) -> None:
    """`requeue_self` within the budget. Raises WorkError where the budget is spent."""
    job = slurm.own_job()
    if job is None:
        return
    try:
        check_budget(run, job)
    except WorkError as error:
        events.write("not requeued", job=job, why=str(error))
        raise
    requeue_self(events, signal_name, exclude)


def bad_nodes(run: Path, life: str) -> list[str]:
    """Nodes that failed the preflight of this life."""
    verdicts = [read_json(path) for path in sorted((run / "preflight" / life).glob("*.json"))]
    return [v["node"] for v in verdicts if not v["ok"]]


def after_failure(run: Path, code: int) -> None:
    """In the batch script, when srun ended with `code`: come back unless the fault would be the same again."""
    job = slurm.own_job()
    if job is None or slurm.state(job) != "RUNNING":  # cancelled, or Slurm requeues it by itself
        return
    life = f"{job}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    events = Events(run, process_name("train-batch"), life=life)
    this = next((x for x in read_lives(read_events(run)) if x.name == life), Life(life))
    if this.of("requeued", "not requeued"):
        return
    events.write("step ended", code=code, silent=this.silent)
    final = next((e for e in this.of("failed") if e.get("final")), None)
    if final:
        events.write("not requeued", why=final["why"])
        return
    requeue_training(run, events, None, bad_nodes(run, life))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the requeue sends it to us too, and nodes are to be excluded after it
    try:
        after_failure(Path(sys.argv[1]), int(sys.argv[2]))
    except WorkError as error:
        print(f"error: {error}", file=sys.stderr)
