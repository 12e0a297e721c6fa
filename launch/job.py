"""What runs on a node: small picklable callables that get a run folder."""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from launch import preflight, slurm
from launch.rendezvous import meet, place
from launch.requeue import check_budget, requeue_elsewhere, requeue_self, requeue_training
from stablerep.eval.config import EvaluateConfig
from stablerep.runtime.config import from_yaml
from stablerep.runtime.errors import UsageError, WorkError
from stablerep.runtime.events import Events, process_name
from stablerep.runtime.rundir import write_atomic
from stablerep.runtime.stop import StopFlag
from stablerep.runtime.watchdog import Watchdog, collective_timeout, last_words
from stablerep.train_config import TrainConfig

EVALUATION_S = 7 * 24 * 3600.0  # ranks may wait long for the one that fits a classifier


def _fail(error: Exception) -> NoReturn:
    """End a task with one readable line (submitit turns an exception into a traceback)."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2 if isinstance(error, UsageError) else 1)


@dataclass
class GenerateTask:
    """One worker a task: on GPU nodes one a GPU. `scratch` is the cluster file's."""

    run: str
    gpus: int
    scratch: str | None = None

    def __call__(self) -> str:
        """Work until nothing is left, or until told to stop: by a signal it requeues itself, by the file STOP it does not.
        With a broken GPU it comes back on another node."""
        from submitit import JobEnvironment

        from generation.triage import Kind, WorkerEnds, interruption
        from generation.worker import work
        from launch.cluster import cancel_waiting

        stop = StopFlag().install()  # after submitit's own handlers, which it replaces
        preflight.keep_caches_local(preflight.scratch_folder(self.scratch))
        rank = JobEnvironment().local_rank
        run, name, node = Path(self.run), process_name(f"generate-{rank}"), slurm.own_node()
        end = slurm.own_end() if rank == 0 else None  # asked now: a preemption sets it to the end of the time of grace
        events = Events(run, name)
        if rank == 0 and (run / "dataset.json").exists():
            cancel_waiting(run, "generate")  # those that wait would begin for nothing, as we do
        try:
            try:
                outcome = work(run, device=f"cuda:{rank}" if self.gpus else "cpu", stop=stop, name=name, node=node)
            except WorkerEnds as error:
                if error.kind is Kind.GPU:
                    requeue_elsewhere(run, events, stop.requested, node)
                raise
            if outcome == "stopped" and rank == 0:
                events.write("interrupted", fault=interruption(time.time(), end), node=node, why=stop.requested)
                requeue_self(events, stop.requested)
        except (UsageError, WorkError) as error:
            _fail(error)
        return outcome


@dataclass
class TrainTask:
    """One rank of a training job. `submitted` (Unix time) tells the lives of local jobs apart, whose ids come again."""

    run: str
    gpus: int
    submitted: int
    signal_lead_s: int = 120
    scratch: str | None = None

    def __call__(self) -> str:
        """Train to the end, or stop together and requeue."""
        from submitit import JobEnvironment

        stop = StopFlag().install()
        stop.first_lead_s = float(self.signal_lead_s)
        where, run = JobEnvironment(), Path(self.run)
        rank, world = where.global_rank, where.num_tasks
        restart = os.environ.get("SLURM_RESTART_COUNT", "0") if slurm.own_job() else self.submitted
        life = f"{where.job_id}-{restart}"
        events = Events(run, process_name(f"train-{rank}"), life=life, rank=rank)
        with contextlib.suppress(OSError):  # a node that cannot write here is named by its preflight
            events.write("started", world=world, host=os.uname().nodename, node=slurm.own_node())
        try:
            if rank == 0 and slurm.own_job():
                check_budget(run, str(where.job_id), beginning=life)
                stop.end = slurm.own_end()
            return self._train(where, run, life, events, stop)
        except (UsageError, WorkError) as error:
            self._last_words(run, life, rank, events, error, str(error), final=True)
        except preflight.BadNode as error:
            self._last_words(run, life, rank, events, error, str(error), final=False)
        except BaseException as error:  # also a library's SystemExit
            self._last_words(run, life, rank, events, error, f"{type(error).__name__}: {error}", final=False)

    def _train(self, where: Any, run: Path, life: str, events: Events, stop: StopFlag) -> str:
        rank, world, local = where.global_rank, where.num_tasks, where.local_rank
        here = world // where.num_nodes
        scratch = preflight.scratch_folder(self.scratch)
        preflight.keep_caches_local(scratch)
        report = preflight.check_node(run, scratch, slurm.own_node(), rank, local, self.gpus)
        store = meet(run, life, rank, world, one_node=where.num_nodes == 1)
        preflight.agree(store, run, life, report, slurm.own_nodes(), world)
        if rank == 0:
            place(run, life).unlink(missing_ok=True)
        self._freeze(store, run, rank, world)
        hang_timeout_s = from_yaml(TrainConfig, run / "config.yaml").hang_timeout_s
        watchdog = Watchdog(last_words(run, life, rank), events, hang_timeout_s)
        from stablerep.runtime import dist
        from stablerep.train import train

        dist.start(store, rank, world, local_rank=local, gpus=self.gpus, timeout_s=collective_timeout(hang_timeout_s))
        outcome: str = train(run, stop, events, watchdog, life, here)
        dist.finish()
        watchdog.close()
        events.write("ended", outcome=outcome, signal=stop.requested)
        if outcome == "stopped" and rank == 0:
            requeue_training(run, events, stop.requested)
        dist.skip_destructors()
        return outcome

    @staticmethod
    def _freeze(store: Any, run: Path, rank: int, world: int) -> None:
        """What submitting leaves to a job that waited for its data: rank 0 makes the index and the plan. Raises UsageError."""
        if rank == 0 and not (run / "train.json").exists():
            from stablerep.plan import freeze

            freeze(from_yaml(TrainConfig, run / "config.yaml"), run, world)
        if rank == 0:
            store.set("frozen", "yes")
        else:  # where rank 0 fails, its store ends with it
            store.wait(["frozen"], timedelta(days=1))

    @staticmethod
    def _last_words(run: Path, life: str, rank: int, events: Events, error: BaseException, why: str, final: bool) -> NoReturn:
        """Write why this rank ends, and end at once: its peers wait for it in a collective. A `final` fault would be the
        same again, so that the job is not requeued."""
        print(f"error: {why}", file=sys.stderr)
        if not final and not isinstance(error, preflight.BadNode):
            traceback.print_exception(error)
        with contextlib.suppress(OSError):
            write_atomic(last_words(run, life, rank), why + "\n\n" + "".join(traceback.format_exception(error)))
            events.write("failed", why=why.splitlines()[0], final=final)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2 if isinstance(error, UsageError) else 1)


def score_together(run: Path, name: str, gpus: int, score: Callable[[], int]) -> str:
    """One rank of the evaluation `name`, whose events go to `run`: the ranks of a node `score` together, which says how many
    numbers there are. A rank that fails ends at once: its peers wait for it."""
    from submitit import JobEnvironment

    where = JobEnvironment()
    rank, world = where.global_rank, where.num_tasks
    life = f"{name}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    events = Events(run, process_name(f"evaluate-{rank}"), element=name, rank=rank)
    try:
        if world > 1:
            from stablerep.runtime import dist

            store = meet(run, life, rank, world, one_node=True)
            dist.start(store, rank, world, local_rank=where.local_rank, gpus=gpus, timeout_s=EVALUATION_S)
        found = score()
        if rank == 0:
            events.write("evaluated", numbers=found)
        if world > 1:
            dist.finish()
            dist.skip_destructors()
        return "done"
    except BaseException as error:
        ours = isinstance(error, UsageError | WorkError)
        why = str(error) if ours else f"{type(error).__name__}: {error}"
        print(f"error: {why}", file=sys.stderr, flush=True)
        if not ours:
            traceback.print_exception(error)
        events.write("failed", why=why)
        sys.stdout.flush()
        os._exit(2 if isinstance(error, UsageError) else 1)


@dataclass
class EvaluateTask:
    """One rank of an element of an evaluation: `config` names one checkpoint and one data set, `name` the element."""

    run: str
    name: str
    config: EvaluateConfig
    gpus: int

    def __call__(self) -> str:
        """Score what is not in results.jsonl yet."""
        from launch.evaluate import evaluate

        return score_together(Path(self.run), self.name, self.gpus, lambda: len(evaluate(self.config)))


@dataclass
class ScoreTask:
    """One rank of all evaluations of a training run of a sweep."""

    sweep: str
    training: str
    entries: list[str]
    name: str
    gpus: int

    def __call__(self) -> str:
        """Score what has no results yet."""
        from launch.scores import score_all

        home = Path(self.sweep) / "evaluate" / self.training
        return score_together(home, self.name, self.gpus, lambda: score_all(Path(self.sweep), self.training, self.entries))
