"""What doctor.py runs on the nodes: every task looks at its node and the shared folder, and writes what it found."""

import importlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from launch import preflight, slurm
from launch.rendezvous import meet
from stablerep.runtime.rundir import write_json
from stablerep.runtime.stop import StopFlag

PACKAGES = (
    "torch", "torchvision", "timm", "diffusers", "transformers", "deepspeed", "submitit", "omegaconf", "pyarrow", "simplejpeg",
)  # fmt: skip
PEERS_S = 35.0  # in which all tasks must see each other's files: NFS may remember for 30 s that a file is not there
LIFE_S = 400.0  # longer than doctor.py waits for the slowest report
RACES = 20


@dataclass
class Found:
    """What one task found."""

    rank: int
    node: str
    pid: int
    problems: list[str] = field(default_factory=list)  # of the preflight: scratch, run folder, matrix product, GPU
    gpu: str | None = None
    python: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)  # packages that do not import
    model: str | None = None  # fingerprint of its folder; None where it is not there, or not asked for
    peers: list[int] = field(default_factory=list)  # tasks whose files it saw in the shared folder
    created: list[int] = field(default_factory=list)  # races for a new file that it won
    renamed: list[int] = field(default_factory=list)  # races to rename a file away that it won
    torn: int = 0  # half-written files that it saw while others replaced them
    skew_s: float = 0.0  # the file server's clock minus this node's
    unreached: str | None = None  # why this task and rank 0 do not reach each other by TCP
    signal: str | None = None  # that came


@dataclass
class ProbeTask:
    """One task of the probe job. `out` holds the reports; `folder` is the shared folder to check, in which the node fills in
    variables; `world` is the number of tasks."""

    out: str
    folder: str
    world: int
    gpus: int
    scratch: str | None
    model: str | None

    def __call__(self) -> None:
        """Look, report, wait for the signal, report again; rank 0 then asks for the requeue when it is told to."""
        from submitit import JobEnvironment

        stop = StopFlag().install()
        if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
            return  # the requeue worked, and there is nothing else to find out
        where, out = JobEnvironment(), Path(self.out)
        found = Found(where.global_rank, slurm.own_node(), os.getpid())
        folder = Path(os.path.expandvars(self.folder))
        found.peers = self._peers(found, folder)
        store = None
        if len(found.peers) == self.world:
            store, found.unreached = meet_peers(folder, found.rank, self.world, one_node=where.num_nodes == 1)
        self._race(found, folder, store)
        self._node(found, where.local_rank, out)
        report = out / "reports" / f"{found.rank}.json"
        write_json(report, asdict(found))
        end = out / "end"
        wait(lambda: stop.signal is not None or end.exists(), LIFE_S)
        found.signal = stop.signal
        write_json(out / "signalled" / f"{found.rank}.json", asdict(found))
        wait(end.exists, LIFE_S)
        job = slurm.own_job()
        if found.rank == 0 and job is not None:
            asked = slurm.client("scontrol", "requeue", job)
            write_json(out / "requeue.json", {"job": job, "code": asked.returncode, "said": asked.stderr.strip()})

    def _node(self, found: Found, local_rank: int, out: Path) -> None:
        """This node: preflight, packages, model."""
        scratch = preflight.scratch_folder(self.scratch)
        report = preflight.check_node(out, scratch, found.node, found.rank, local_rank, self.gpus)
        found.problems, found.gpu = report.problems, report.gpu
        if local_rank == 0:
            found.python, found.versions = platform.python_version(), versions()
            found.broken = [f"{name} ({why})" for name in PACKAGES if (why := import_error(name))]
            found.model = fingerprint_of(self.model)

    def _peers(self, found: Found, folder: Path) -> list[int]:
        """Leave a file, and wait for everybody's."""
        folder.mkdir(parents=True, exist_ok=True)
        found.skew_s = skew_s(folder / f"clock-{found.rank}")
        for k in range(RACES if found.rank == 0 else 0):
            (folder / f"lease-{k}").touch()
        (folder / f"here-{found.rank}").touch()

        def seen() -> list[int]:
            return [r for r in range(self.world) if (folder / f"here-{r}").exists()]

        wait(lambda: len(seen()) == self.world, PEERS_S)
        return seen()

    def _race(self, found: Found, folder: Path, store: Any) -> None:
        """Do with the others, at the same moment where there is a `store`, what leases and commits do."""
        for k in range(RACES):
            if store is not None:
                store.set(f"race-{k}/{found.rank}", "")
                store.wait([f"race-{k}/{r}" for r in range(self.world)], timedelta(seconds=PEERS_S))
            found.created += [k] if create(folder / f"race-{k}") else []
            found.renamed += [k] if rename(folder / f"lease-{k}", folder / f"taken-{k}-{found.rank}") else []
            found.torn += replace_and_read(folder / "replaced", found.rank)


def wait(condition: Callable[[], Any], seconds: float) -> bool:
    """Poll until the condition holds; False after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def create(path: Path) -> bool:
    """Whether this process is the one that made the file (a worker claims a shard like this)."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def rename(path: Path, target: Path) -> bool:
    """Whether this process is the one that took the file away (a worker takes a stale lease over like this)."""
    try:
        path.rename(target)
    except FileNotFoundError:
        return False
    return True


def replace_and_read(path: Path, rank: int) -> int:
    """Replace a file of 64 kB, all of one byte, and read it: 1 where it holds several, as a half-written one does."""
    temporary = path.with_name(f".{path.name}-{rank}")
    temporary.write_bytes(bytes([rank % 256]) * 65536)
    temporary.replace(path)
    data = path.read_bytes()
    return int(len(data) != 65536 or len(set(data)) != 1)


def skew_s(path: Path) -> float:
    """Seconds by which the clock of the file's server is ahead of this node's."""
    before = time.time()
    path.touch()
    return path.stat().st_mtime - (before + time.time()) / 2


def meet_peers(folder: Path, rank: int, world: int, one_node: bool) -> tuple[Any, str | None]:
    """Meet the other tasks as the ranks of training do: (store, None), or (None, why not)."""
    try:
        store = meet(folder, "doctor", rank, world, one_node=one_node, bound_s=PEERS_S)
        store.set(f"here/{rank}", "")
        store.wait([f"here/{r}" for r in range(world)], timedelta(seconds=PEERS_S))
        return store, None
    except Exception as error:  # torch raises several kinds
        return None, str(error).splitlines()[0]


def versions() -> dict[str, str]:
    """Installed versions of what the toolkit stands on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def import_error(name: str) -> str | None:
    """Why a package does not import; None where it does."""
    try:
        importlib.import_module(name)
    except Exception as error:  # a package that is broken raises anything
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def fingerprint_of(model: str | None) -> str | None:
    """Hash of a model folder as this machine sees it; None where it is not there."""
    from generation.settings import fingerprint

    return fingerprint(Path(model)) if model and (Path(model) / "model_index.json").exists() else None
