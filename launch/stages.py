"""The stages of a sweep as pieces of work: what is missing, where each stands, and running them on this machine."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from generation.failures import set_aside
from generation.settings import GenerateConfig
from launch.grid import Stage, Sweep
from launch.progress import duration, last_word
from stablerep.eval.config import EvaluateConfig
from stablerep.plan import check_same
from stablerep.runtime.config import from_yaml, part, to_dict, to_yaml
from stablerep.runtime.errors import WorkError
from stablerep.runtime.rundir import REPO, append_jsonl, read_jsonl, write_atomic
from stablerep.train_config import TrainConfig

MARKS = {"real": "*.tar", "generate": "dataset.json", "train": "final/encoder.safetensors", "evaluate": "results.jsonl"}
CONFIGS: dict[str, Any] = {"generate": GenerateConfig, "train": TrainConfig, "evaluate": EvaluateConfig}
STOP_S = 120.0  # for a job to save and end


@dataclass
class Work:
    """What one process or job does: a stage, or all missing evaluations of one training run.

    `key` names its folder and its log; `job` is the name of the jobs that its command starts ("" where it starts none).
    """

    key: str
    job: str
    stages: list[Stage]
    needs: list[str]
    ranks: int


def has_result(out: Path, key: str) -> bool:
    """Whether the result of the stage `key` is there."""
    return any((out / key).glob(MARKS[key.partition("/")[0]]))


def is_done(out: Path, stage: Stage) -> bool:
    """Whether a stage's result is there."""
    return has_result(out, stage.key)


def work_of(key: str) -> str:
    """The key of the work that a stage is part of: evaluations of one training run are one, and share a folder for its jobs."""
    return key.rpartition("/")[0] if key.startswith("evaluate/") else key


def works(sweep: Sweep, out: Path) -> list[Work]:
    """What is missing, in an order in which it can be done."""
    found: dict[str, Work] = {}
    for stage in sweep.stages.values():
        if not is_done(out, stage):
            key = work_of(stage.key)
            job = stage.kind if stage.kind != "real" else ""
            found.setdefault(key, Work(key, job, [], stage.needs, stage.ranks)).stages.append(stage)
    return sorted(found.values(), key=lambda w: list(MARKS).index(w.stages[0].kind))


def check_done(sweep: Sweep, out: Path) -> None:
    """Raise UsageError where a training run that is done was trained with another default than today's."""
    for stage in sweep.stages.values():
        frozen = out / stage.key / "config.yaml"
        if stage.kind == "train" and is_done(out, stage) and frozen.exists():
            before = from_yaml(TrainConfig, frozen)
            check_same(replace(part(TrainConfig, stage.config), data=before.data), before, out / stage.key)


def write_config(out: Path, stage: Stage) -> Path:
    """The file that a stage's command gets by --config."""
    path = out / "configs" / f"{stage.key}.yaml"
    config = part(CONFIGS[stage.kind], stage.config)
    if stage.kind != "evaluate":
        config.out = str(out / stage.key)
    if stage.kind == "train":  # what the sweep makes is named by its key
        config.data = [str(out / d) if d in stage.needs else d for d in config.data]
    text = to_yaml(config)
    if not path.exists() or path.read_text() != text:
        write_atomic(path, text)
    return path


def command_of(out: Path, work: Work, where: list[str]) -> list[str]:
    """The command line of a piece of work; `where` are the flags of the cluster."""
    stage = work.stages[0]
    if stage.kind == "real":
        given = {k.replace("_", "-"): v for k, v in to_dict(stage.config).items() if v is not None}
        return ["generation/tiny/real.py", "--out", str(out / stage.key), *(f"--{k}={v}" for k, v in given.items())]
    files = [write_config(out, s) for s in work.stages]
    if stage.kind == "evaluate":
        return ["launch/scores.py", str(out), work.key.partition("/")[2], *(f.stem for f in files)]
    place = ["--nodes", str(stage.config.nodes)]
    if stage.config.gpus_per_node is not None:
        place += ["--gpus-per-node", str(stage.config.gpus_per_node)]
    if stage.kind == "generate" and set_aside(out / stage.key, stage.config.attempts):
        place.append("--retry-failed")
    return [f"launch/{stage.kind}.py", "--config", str(files[0]), *place, *where]


def record(out: Path, work: Work, event: str, **fields: Any) -> None:
    """Add a line to OUT/stages.jsonl."""
    append_jsonl(out / "stages.jsonl", {"time": time.time(), "key": work.key, "event": event, **fields})


def last_words(log: Path) -> str:
    """Why a piece of work failed, by its log."""
    return last_word([log], "it printed nothing")


class Here:
    """Runs pieces of work on this machine, as many at once as `parallel`; `failed` holds the reasons by key."""

    def __init__(self, out: Path, todo: list[Work], parallel: int) -> None:
        self.out, self.todo, self.parallel = out, list(todo), parallel
        self.total, self.done = len(todo), 0
        self.left = {work.key for work in todo}
        self.running: dict[str, tuple[Work, subprocess.Popen[bytes], float]] = {}
        self.seconds: dict[str, list[float]] = {}
        self.failed: dict[str, str] = {}

    def run(self) -> None:
        """Until nothing can be done any more. KeyboardInterrupt (also by TERM) stops what runs and goes on upwards."""
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            while self.todo or self.running:
                self._start_ready()
                time.sleep(0.1)
                for key in [key for key, (_, process, _) in self.running.items() if process.poll() is not None]:
                    self._end(key)
        except KeyboardInterrupt:
            print("stopping: each job saves first", flush=True)
            self._stop()
            raise

    def _start_ready(self) -> None:
        for work in sorted(
            self.todo, key=lambda w: w.stages[0].kind != "evaluate"
        ):  # what is trained is scored first: numbers come early
            bad = [need for need in work.needs if need in self.failed]
            if bad:
                self.todo.remove(work)
                self.done += 1
                self.failed[work.key] = f"not run: {bad[0]} failed"
                record(self.out, work, "failed", why=self.failed[work.key])
            elif len(self.running) < self.parallel and not any(need in self.left for need in work.needs):
                self.todo.remove(work)
                self._start(work)

    def _start(self, work: Work) -> None:
        log = self.out / "logs" / f"{work.key}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        words = command_of(self.out, work, ["--cluster", "local", "--wait", "true"])
        threads = str(max(1, (os.cpu_count() or 1) // self.parallel))
        with open(log, "ab") as file:
            process = subprocess.Popen(
                [sys.executable, str(REPO / words[0]), *words[1:]], stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_die_with_parent,
                env={"OMP_NUM_THREADS": threads, **os.environ},
            )  # fmt: skip
        self.running[work.key] = (work, process, time.monotonic())
        record(self.out, work, "started", pid=process.pid)
        self._say("start", work.key)

    def _end(self, key: str) -> None:
        work, process, began = self.running.pop(key)
        took = time.monotonic() - began
        self.left.discard(key)
        self.done += 1
        if process.returncode == 0 and all(is_done(self.out, stage) for stage in work.stages):
            self.seconds.setdefault(work.stages[0].kind, []).append(took)
            record(self.out, work, "done", seconds=took)
            self._say("done", key, f"  {duration(took)}  ETA {self._eta()}")
            return
        self.failed[key] = last_words(self.out / "logs" / f"{key}.log")
        record(self.out, work, "failed", why=self.failed[key])
        self._say("FAILED", key, f"  {self.failed[key]}")

    def _say(self, what: str, key: str, more: str = "") -> None:
        print(f"[{self.done}/{self.total}] {what:<6} {key}{more}", flush=True)

    def _eta(self) -> str:
        """What is left, each piece taken to last as long as those of its kind did."""
        everything = [s for found in self.seconds.values() for s in found]
        mean = {kind: sum(found) / len(found) for kind, found in self.seconds.items()}
        default = sum(everything) / len(everything)
        left = sum(mean.get(w.stages[0].kind, default) for w in self.todo)
        now = time.monotonic()
        left += sum(max(0.0, mean.get(w.stages[0].kind, default) - (now - began)) for w, _, began in self.running.values())
        return duration(left / self.parallel)

    def _stop(self) -> None:
        """End our processes and the jobs that they started; jobs that are told save first."""
        from launch.cluster import all_active

        for _, process, _ in self.running.values():
            process.terminate()
        jobs = {self.out / work.key: work.job for work, _, _ in self.running.values() if work.job}
        end = time.monotonic() + STOP_S
        while pids := [int(job) for found in all_active(jobs).values() for job in found]:
            if time.monotonic() > end:
                raise WorkError(f"process {' '.join(map(str, pids))} does not end")
            for pid in pids:  # told again: a task that is still starting does not listen yet
                os.kill(pid, signal.SIGTERM)
            time.sleep(1)
        for work, process, _ in self.running.values():
            process.wait()
            record(self.out, work, "stopped")


def _die_with_parent() -> None:
    """A killed sweep leaves no command behind that would submit in its name; the jobs themselves go on."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def last_events(out: Path) -> dict[str, dict[str, Any]]:
    """The newest line of OUT/stages.jsonl by key."""
    return {r["key"]: r for r in read_jsonl(out / "stages.jsonl")}
