"""A sweep on Slurm: everything that is missing is submitted at once, each stage after the jobs of those that it needs."""

import contextlib
import importlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launch import slurm
from launch.cluster import ClusterConfig, Shape, all_active, submit
from launch.job import ScoreTask
from launch.overview import sweep_progress
from launch.progress import Every, watch
from launch.stages import Work, command_of, last_words, record
from stablerep.runtime.errors import UsageError, WorkError
from stablerep.runtime.rundir import REPO


def submit_all(name: str, cluster: ClusterConfig, out: Path, todo: list[Work]) -> dict[str, str]:
    """Submit what is missing and not queued yet; why something was not submitted, by key.

    `afterany`: a stage starts when those before it have ended however they ended, and fails at once where their result is
    not there; no job waits for ever. Raises WorkError where Slurm does not answer.
    """
    active = all_active({out / work.key: work.job for work in todo if work.job})
    jobs: dict[str, list[str]] = {}  # by key: the jobs that will make it; none where it is there already
    failed: dict[str, str] = {}
    for number, work in enumerate(todo, 1):
        bad = [need for need in work.needs if need in failed]
        ids = active.get(out / work.key, [])
        try:
            if bad:
                raise UsageError(f"not submitted: {bad[0]} failed")
            # generate.py also tops up an array that is queued in part; the others are one job.
            if not ids or work.job == "generate":
                after = [job for need in work.needs for job in jobs.get(need, [])]
                ids = _submit(name, cluster, out, work, after)
        except (UsageError, WorkError) as error:
            failed[work.key] = str(error)
            record(out, work, "failed", why=str(error))
        jobs[work.key] = sorted({job.split("_")[0] for job in ids}, key=int)  # an array's id stands for all of it
        said = failed.get(work.key) or f"job {' '.join(jobs[work.key])}" * bool(ids) or "done"
        print(f"[{number}/{len(todo)}] {'FAILED' if work.key in failed else 'queued' if ids else 'done':<6} {work.key}  {said}")
    return failed


def _submit(name: str, cluster: ClusterConfig, out: Path, work: Work, after: list[str]) -> list[str]:
    """Submit a piece of work and return its jobs; what the machine here makes by itself is made."""
    run, log = out / work.key, out / "logs" / f"{work.key}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    if work.job == "evaluate":
        words = command_of(out, work, [])
        gpus = cluster.gpus_per_node
        task = ScoreTask(words[1], words[2], words[3:], str(int(time.time())), gpus)
        shape = Shape("evaluate", tasks_per_node=max(1, gpus), gpus_per_node=gpus, after=after)
        return submit(cluster, run, shape, [task], not run.exists())
    words = command_of(out, work, ["--cluster", name, "--wait", "false", *(["--after", *after] if after else [])])
    with open(log, "a") as file:
        if not work.job:
            if subprocess.run([sys.executable, str(REPO / words[0]), *words[1:]], stdout=file, stderr=file).returncode:
                raise WorkError(last_words(log))
            return []
        command: Callable[[list[str]], int] = importlib.import_module(f"launch.{work.job}").main
        with contextlib.redirect_stdout(file):
            command(words[1:])
    return all_active({run: work.job})[run]


def wait_for_all(out: Path, todo: list[Work]) -> None:
    """Stay until no job of the sweep is left, showing how many stages are done; Ctrl-C detaches and kills nothing."""
    runs = {out / work.key: work.job for work in todo if work.job}

    def active() -> bool:
        ids = [job for found in all_active(runs).values() for job in found]
        if ids:
            slurm.nudge(ids)
        return bool(ids)

    watch(lambda: sweep_progress(out), Every(5.0, active), "stages")
