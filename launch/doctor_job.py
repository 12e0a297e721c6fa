"""The doctor's probe job: submit it, wait for its reports, warn it, see it come back, cancel it."""

import contextlib
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from launch import checks
from launch.checks import Finding
from launch.cluster import ClusterConfig, Shape, still_active, submit, within
from launch.doctor_probe import Found, ProbeTask, fingerprint_of, versions, wait
from launch.progress import Every, last_word
from launch.slurm import client, nudge
from stablerep.runtime.errors import UsageError, WorkError
from stablerep.runtime.rundir import read_json

JOB = "doctor"
PROBE_MINUTES = 10
RUN_S = 300.0  # from the start of the job to its last report; imports from a cold file system are slow
SIGNAL_S = 60.0  # the same for the signal, and for the requeue


def run_probe(cluster: ClusterConfig, shape: Shape, task: ProbeTask, patience_s: float) -> Iterator[Finding]:
    """Run the probe job and judge its reports; it is cancelled whatever happens. `patience_s` bounds its wait in the queue."""
    out, world, on_slurm = Path(task.out), task.world, cluster.kind == "slurm"
    try:
        job = submit(within(cluster, PROBE_MINUTES), out, shape, [task], False)[0]
    except UsageError as error:
        yield Finding("fail", str(error), "Mend the cluster file")
        return
    print(f"      probe job {job}: {world} tasks", file=sys.stderr)
    try:
        pending = _await_start(out, job, on_slurm, patience_s)
        if pending:
            why = f"probe job {job} still waits after {patience_s:.0f} s ({pending}): the nodes were not checked"
            yield Finding("fail", why, "Try again later, or with a longer --patience-s")
            return
        found = _gather(out, "reports", world, RUN_S)
        yield from checks.judge_nodes(found, world, cluster.gpus_per_node)
        yield from checks.judge_sharing(found, world)
        yield from checks.judge_packages(found, platform.python_version(), versions())
        if task.model is not None:
            yield from checks.judge_model(found, task.model, fingerprint_of(task.model))
        if not found:
            why = last_word(sorted((out / "logs").glob("*.out")), "no log that this machine sees")
            yield Finding("fail", f"job {job} ended with: {why}", "Keep its logs with --out")
            return
        _warn(job, found, on_slurm)
        yield checks.judge_signals(_gather(out, "signalled", world, SIGNAL_S), world)
        (out / "end").touch()
        if on_slurm:
            yield from _requeue(out, job)
    finally:
        _cancel(out, job, on_slurm)


def _await_start(out: Path, job: str, on_slurm: bool, patience_s: float) -> str | None:
    """Wait until the job runs or has gone; else why it waits."""

    def waiting() -> str:
        return client("squeue", "-h", "-j", job, "-t", "PENDING,CONFIGURING", "-o", "%r").stdout.strip() if on_slurm else ""

    return None if wait(lambda: not waiting(), patience_s) else waiting()


def _gather(out: Path, name: str, world: int, bound_s: float) -> list[Found]:
    """Reports of all tasks, or those that came before the job ended or `bound_s` was over."""
    gone = Every(3.0, lambda: not still_active(out, JOB))

    def count() -> int:
        return len(list((out / name).glob("[0-9]*.json")))

    wait(lambda: count() == world or gone(), bound_s)
    time.sleep(0 if count() == world else 2)  # the last report of a job that has just ended
    return sorted((Found(**read_json(path)) for path in (out / name).glob("[0-9]*.json")), key=lambda f: f.rank)


def _warn(job: str, found: list[Found], on_slurm: bool) -> None:
    """USR1 to every task, as Slurm sends it ahead of the end of the wall time."""
    if on_slurm:
        client("scancel", "--signal=USR1", job)
        return
    for f in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(f.pid, signal.SIGUSR1)


def _requeue(out: Path, job: str) -> Iterator[Finding]:
    """The job asked Slurm from its node to run it again: does it wait for its next life, and may that wait be ended?"""
    asked = out / "requeue.json"
    wait(asked.exists, SIGNAL_S)
    answer = read_json(asked) if asked.exists() else {"code": 1, "said": "no answer"}

    def lives() -> str:
        return client("squeue", "-h", "-j", job, "-O", "RestartCnt:12,StateCompact:12").stdout

    if answer["code"] not in (0, -signal.SIGTERM) or not wait(lambda: lives().split()[:2] == ["1", "PD"], 120.0):
        why = answer["said"] or f"the job is {lives().split()[1:] or 'gone'} after it"
        do = "Preempted and timed-out work comes back only by the same command"
        yield Finding("fail", f"a job cannot requeue itself: {why}", do)
        return
    yield Finding("ok", "a job requeues itself from its node")
    if nudge([job]):
        yield Finding("ok", "users may end the wait of a requeued job: --wait and status.py --watch do")
    else:
        do = "It comes back after the seconds of AuthInfo cred_expire"
        yield Finding("warn", "users may not end the wait of a requeued job", do)


def _cancel(out: Path, job: str, on_slurm: bool) -> None:
    """End the job, and wait until nothing of it writes any more."""
    (out / "end").touch()
    if on_slurm:
        client("scancel", job)
    with contextlib.suppress(WorkError):
        wait(lambda: not still_active(out, JOB), 60.0)
