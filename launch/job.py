"""What runs on a node: small picklable callables that get a run folder, and the requeue."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from stablerep.runtime.errors import UsageError, WorkError
from stablerep.runtime.events import Events, process_name
from stablerep.runtime.rundir import write_json
from stablerep.runtime.stop import StopFlag

RENDEZVOUS_S = 600


def requeue_self(events: Events, signal_name: str | None) -> None:
    """Ask Slurm to run this job (of an array: this element) again after `signal_name`; nothing outside Slurm.

    A job that got TERM and no longer runs was cancelled by its user, or Slurm requeues it by itself: it is left alone.
    """
    env = os.environ
    if "SLURM_JOB_ID" not in env:
        return
    array = env.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{env['SLURM_ARRAY_TASK_ID']}" if array else env["SLURM_JOB_ID"]
    if signal_name == "SIGTERM" and _client("squeue", "-h", "-j", job, "-o", "%T").stdout.strip() != "RUNNING":
        events.write("not requeued", job=job, why="cancelled, or requeued by Slurm itself")
        return
    events.write("requeued", job=job)
    result = _client("scontrol", "requeue", job)
    if result.returncode not in (0, -signal.SIGTERM):
        events.write("failed", why=f"scontrol requeue {job}: {result.stderr.strip()}")
        raise WorkError(f"cannot requeue {job} ({result.stderr.strip()}); give the same command again")


def _client(*words: str) -> subprocess.CompletedProcess[str]:
    """A Slurm client that outlives TERM, which a requeue sends to every process of the step."""
    return subprocess.run(
        words, capture_output=True, text=True, preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN)
    )


def _fail(error: Exception) -> None:
    """End a task with one readable line (submitit turns an exception into a traceback)."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2 if isinstance(error, UsageError) else 1)


@dataclass
class GenerateTask:
    """One worker a task: on GPU nodes one a GPU."""

    run: str
    gpus: int

    def __call__(self) -> str:
        """Work until nothing is left, or stop and requeue."""
        from submitit import JobEnvironment

        from generation.worker import work

        stop = StopFlag().install()  # after submitit's own handlers, which it replaces
        rank = JobEnvironment().local_rank
        run, name = Path(self.run), process_name(f"generate-{rank}")
        try:
            outcome = work(run, device=f"cuda:{rank}" if self.gpus else "cpu", stop=stop, name=name)
            if outcome == "stopped" and rank == 0:
                requeue_self(Events(run, name), stop.requested)
        except (UsageError, WorkError) as error:
            _fail(error)
        return outcome


@dataclass
class TrainTask:
    """One rank of a training job."""

    run: str
    gpus: int

    def __call__(self) -> str:
        """Train to the end, or stop together and requeue."""
        from submitit import JobEnvironment

        stop = StopFlag().install()
        where = JobEnvironment()
        rank, world = where.global_rank, where.num_tasks
        run = Path(self.run)
        events = Events(run, process_name(f"train-{rank}"))
        life = f"{where.job_id}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        events.write("started", rank=rank, world=world, host=socket.gethostname(), life=life)
        from stablerep.runtime import dist
        from stablerep.train import train

        try:
            store = _meet(run, life, rank, world, one_node=where.num_nodes == 1)
            dist.start(store, rank, world, local_rank=where.local_rank, gpus=self.gpus)
            outcome = train(run, stop, events)
            dist.finish()
            events.write("ended", outcome=outcome, signal=stop.requested)
            if outcome == "stopped" and rank == 0:
                requeue_self(events, stop.requested)
        except (UsageError, WorkError) as error:
            events.write("failed", why=str(error))
            _fail(error)
        except Exception as error:
            events.write("failed", why=f"{type(error).__name__}: {error}")
            raise
        return outcome


def _meet(run: Path, life: str, rank: int, world: int, one_node: bool):  # type: ignore[no-untyped-def]
    """Rank 0 binds a free port and publishes it in the run folder under this life of the job; the others read it."""
    from torch.distributed import TCPStore

    path = run / "rendezvous" / f"{life}.json"
    if rank == 0:
        store = TCPStore("127.0.0.1" if one_node else "0.0.0.0", 0, world, is_master=True, wait_for_workers=False)
        write_json(path, {"host": "127.0.0.1" if one_node else _address(), "port": store.port})
        return store
    deadline = time.monotonic() + RENDEZVOUS_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise WorkError(f"rank 0 did not publish {path} within {RENDEZVOUS_S} s: its log says why")
        time.sleep(0.2)
    place = json.loads(path.read_text())
    return TCPStore(place["host"], place["port"], world, is_master=False)


def _address() -> str:
    """This node's address as other nodes see it: its name's, unless that is a loopback address."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "127.0.0.1"
    if not address.startswith("127."):
        return address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing, only asks for the route
        try:
            probe.connect(("10.255.255.255", 1))
            return str(probe.getsockname()[0])
        except OSError:
            return address
