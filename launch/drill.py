"""The drill: a short training run on the user's own cluster that is requeued, warned and killed, and what is left of it.

It claims nothing that its files do not show: every line of its verdict is read from the run folder.
"""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from launch import slurm
from launch.cluster import ClusterConfig, nudge, still_active
from launch.ledger import ledger_lines
from launch.lives import Life, read_lives
from stablerep.runtime.errors import UsageError, WorkError
from stablerep.runtime.events import read_events
from stablerep.runtime.rundir import REPO, data_folder, read_jsonl

DATA = ["--limit", "32", "--images-per-caption", "2", "--steps", "4", "--captions-per-shard", "8", "--wait", "true"]
TRAIN = ["--config", str(data_folder("configs") / "train" / "demo.yaml"), "--images-per-caption", "2", "--log-every", "1"]
TRAIN += ["--checkpoint-every", "20", "--head-hidden", "64", "--head-out", "32"]
STEPS_BETWEEN = 30  # of a life before it is disturbed: at least one checkpoint, and steps after it
LIFE_S = 600.0  # a life must get so far, its queue included


@dataclass
class Drill:
    """A run, and how to start it, look at it and disturb it."""

    run: Path
    cluster: ClusterConfig
    start: list[str]  # the command that submits or resumes the run

    def submit(self) -> None:
        """Give the command, which returns once the job is submitted."""
        done = subprocess.run(self.start, capture_output=True, text=True)
        if done.returncode:
            raise WorkError(done.stderr.strip().removeprefix("error: ") or "the run cannot be submitted")

    def lives(self) -> list[Life]:
        return read_lives(e for e in read_events(self.run) if str(e["process"]).startswith("train-"))

    def metrics(self) -> list[dict[str, Any]]:
        return list(read_jsonl(self.run / "metrics.jsonl"))

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Poll until the condition holds. Raises WorkError after LIFE_S, and where no job is left to bring it about."""
        end = time.monotonic() + LIFE_S
        while not condition():
            if self.cluster.kind == "slurm":
                nudge(self.run, "train")
            alive = bool(still_active(self.run, "train"))
            if condition():
                return
            if not alive or time.monotonic() > end:
                raise WorkError(f"the drill waited for {what}: {'no job is left' if not alive else f'{LIFE_S:.0f} s'}")
            time.sleep(1.0)

    def disturb(self, how: str) -> None:
        """`requeue`, `warn` or `kill` the job; on this machine one of its ranks, and the command is given again."""
        if self.cluster.kind == "slurm":
            job = next(read_jsonl(self.run / "jobs.jsonl"))["jobs"][0]
            words = {"requeue": ["scontrol", "requeue", job], "warn": ["scancel", "--signal=USR1", job]}
            result = slurm.client(*words.get(how, ["scancel", "--signal=KILL", f"{job}.0"]))
            if result.returncode:
                raise WorkError(f"Slurm refused to {how} {job}: {result.stderr.strip()}")
            return
        self._signal_rank({"requeue": signal.SIGTERM, "warn": signal.SIGUSR1, "kill": signal.SIGKILL}[how])
        self.settle()
        self.submit()

    def cancel(self) -> None:
        """Leave no job behind where the drill ends early."""
        for job in still_active(self.run, "train"):
            if self.cluster.kind == "slurm":
                slurm.client("scancel", job)
            else:
                self._signal_rank(signal.SIGTERM)

    def _signal_rank(self, number: signal.Signals) -> None:
        process = self.lives()[-1].of("started")[-1]["process"]
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process.rsplit("-", 1)[1]), number)

    def settle(self) -> None:
        """Wait until no job of the run is left. Raises WorkError after two minutes."""
        end = time.monotonic() + 120
        while still_active(self.run, "train"):
            if time.monotonic() > end:
                raise WorkError("a job of the run is still there two minutes after its end")
            time.sleep(0.5)


def run_drill(out: Path, data: list[str], cluster: ClusterConfig, launch: list[str], ranks: int, steps: int) -> bool:
    """Make data where none is given, train, disturb three times, judge. True where every claim holds.

    Raises UsageError and WorkError where the drill itself cannot go on.
    """
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} exists: the drill wants a new folder")
    if not data:
        print("making 64 images on this machine", flush=True)
        words = ["--captions", str(data_folder("assets") / "captions.txt"), "--out", str(out / "data"), "--cluster", "local"]
        made = subprocess.run([sys.executable, str(REPO / "launch/generate.py"), *words, *DATA], capture_output=True, text=True)
        if made.returncode:
            raise WorkError(made.stderr.strip().removeprefix("error: "))
        data = [str(out / "data")]
    batch = 2 * ranks * -(-8 // ranks)  # at least 16 images, two a rank
    train = [sys.executable, str(REPO / "launch" / "train.py"), "--data", *data, "--out", str(out / "run"), *TRAIN]
    command = [*train, "--global-batch", str(batch), "--steps", str(steps)]
    drill = Drill(out / "run", cluster, [*command, *launch, "--wait", "false"])
    drill.submit()
    try:
        _disturb_thrice(drill)
    except BaseException:
        drill.cancel()
        raise
    verdict = judge(drill, steps)
    for claim, holds in verdict:
        print(f"{'PASS' if holds else 'FAIL'}  {claim}")
    print("\n".join(ledger_lines(drill.run)))
    return all(holds for _, holds in verdict)


def _disturb_thrice(drill: Drill) -> None:
    for number, how in enumerate(("requeue", "warn", "kill")):
        drill.wait(partial(_far_enough, drill, number), f"{STEPS_BETWEEN} steps of life {number + 1}")
        print(f"life {number + 1} is at step {drill.metrics()[-1]['step']}: {how}", flush=True)
        drill.disturb(how)
    drill.wait(lambda: (drill.run / "final" / "encoder.safetensors").exists(), "the end of the run")
    drill.settle()


def _far_enough(drill: Drill, number: int) -> bool:
    lives = drill.lives()
    if len(lives) <= number or lives[number].first_step is None:
        return False
    return sum(m["life"] == lives[number].name for m in drill.metrics()) >= STEPS_BETWEEN


def judge(drill: Drill, steps: int) -> list[tuple[str, bool]]:
    """Every claim with whether the run's files bear it out."""
    lives, metrics = drill.lives(), drill.metrics()
    jobs = [job for r in read_jsonl(drill.run / "jobs.jsonl") for job in r["jobs"]]
    begun = [life.first_step for life in lives]
    saved = [max((x.saved or 0 for x in lives[:n]), default=0) for n in range(len(lives))]
    stops = [e for life in lives[1:2] for e in life.of("stopped")]
    digests: dict[int, set[str]] = {}
    for record in metrics:
        digests.setdefault(record["step"], set()).add(record["ids"])
    again = len(metrics) - len(digests)
    claims = [
        (f"four lives: {' '.join(life.name for life in lives)}", len(lives) == 4),
        (f"resumed from the newest checkpoint: {begun[1:]} after {saved[1:]}", begun == saved),
        (f"warned, it lost no step: stopped at {stops[0]['step'] if stops else '?'}",
         bool(stops) and len(lives) > 2 and lives[2].first_step == stops[0]["step"]),
        (f"no gap in steps 1 to {steps}", sorted(digests) == list(range(1, steps + 1))),
        (f"{again} steps done again saw the same samples", all(len(seen) == 1 for seen in digests.values())),
        ("nothing half-written is left", not list((drill.run / "checkpoints").glob(".*"))),
    ]  # fmt: skip
    if drill.cluster.kind == "slurm":
        claims.insert(0, (f"one job: {' '.join(sorted(set(jobs)))}", len({life.job for life in lives}) == len(jobs) == 1))
    return claims + [_return_time(before, after) for before, after in itertools.pairwise(lives)]


def _return_time(before: Life, after: Life) -> tuple[str, bool]:
    """From the end of a life to the first step of the next one; the toolkit's own part is what it may be blamed for."""
    steps = after.of("first step")
    if not steps:
        return f"life {after.name} did a step", False
    gone, started, first = (float(e["time"]) for e in (before.events[-1], after.of("started")[0], steps[0]))
    return f"back at a step {first - gone:.0f} s after life {before.name} ended (queue {started - gone:.0f} s)", True
