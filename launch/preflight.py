"""Preflight: before a step is paid for, every rank checks its node, and rank 0 gathers a verdict a node.

The verdicts lie in RUN/preflight/LIFE/NODE.json. A node that fails is left out when the job is requeued.
"""

import contextlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from stablerep.runtime.rundir import write_json

PEERS_S = 600.0  # by then every rank must have reported
HEARD_S = 10.0


class BadNode(Exception):
    """One or several nodes failed the preflight: the job comes back without them."""


@dataclass
class Report:
    """What one rank found."""

    node: str
    rank: int
    gpu: str | None = None
    problems: list[str] = field(default_factory=list)


def scratch_folder(scratch: str | None) -> Path:
    """The node-local folder: the cluster file's `scratch` with this node's variables filled in, or the system's."""
    return Path(os.path.expandvars(scratch) if scratch else tempfile.gettempdir())


def keep_caches_local(scratch: Path) -> None:
    """Compilers' caches go to this node: on a home that many nodes share they break. A user's own setting wins."""
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        os.environ.setdefault(name, str(scratch / f"stablerep-{os.getuid()}" / name.lower()))


def check_node(run: Path, scratch: Path, node: str, rank: int, local_rank: int, gpus: int) -> Report:
    """Check this rank's node: the two folders hold what is written, the GPU is there, a matrix product is right."""
    report = Report(node, rank)

    def attempt(what: str, check: Callable[[], str | None]) -> None:
        try:
            problem = check()
        except (OSError, RuntimeError) as error:  # RuntimeError: what CUDA raises
            problem = str(error).splitlines()[0]
        if problem:
            report.problems.append(f"{what}: {problem}")

    attempt(f"run folder {run}", lambda: _holds_what_is_written(run / "preflight", rank))
    attempt(f"scratch {scratch}", lambda: _holds_what_is_written(scratch, rank))
    if gpus:
        attempt("GPU", lambda: _see_gpu(report, local_rank))
    if not (gpus and report.gpu is None):
        attempt("matrix product", lambda: _multiply(f"cuda:{local_rank}" if gpus else "cpu", 2048 if gpus else 128))
    return report


def agree(store: Any, run: Path, life: str, report: Report, nodes: list[str], world: int, bound_s: float = PEERS_S) -> None:
    """Give the report to rank 0 and hear its verdict, within `bound_s` or as soon as one report is bad.

    Raises BadNode on every rank, naming the nodes that failed or did not come (`nodes` is in the order of the ranks).
    """
    store.set(f"preflight/{report.rank}", json.dumps(asdict(report)))
    if report.rank == 0:
        reports = _gather(store, world, bound_s)
        missing = set(range(world)) - {r.rank for r in reports}
        if not any(r.problems for r in reports):  # a bad node ends the wait for the others, who are not to blame
            reports += [Report(nodes[r * len(nodes) // world], r, None, ["did not come"]) for r in sorted(missing)]
        store.set("preflight/verdict", json.dumps(judge(run, life, reports)))
    store.wait(["preflight/verdict"], timedelta(seconds=bound_s + 60))
    bad = json.loads(store.get("preflight/verdict"))
    if not bad:
        return
    store.set(f"preflight/heard/{report.rank}", "")
    if report.rank == 0:  # the store ends with this process: first let the others hear
        with contextlib.suppress(RuntimeError):
            store.wait([f"preflight/heard/{r.rank}" for r in reports if r.rank not in missing], timedelta(seconds=HEARD_S))
    raise BadNode("; ".join(bad))


def judge(run: Path, life: str, reports: list[Report]) -> list[str]:
    """Write a verdict a node and return one line for each bad node."""
    lines = []
    for node in dict.fromkeys(r.node for r in reports):
        mine = [r for r in reports if r.node == node]
        problems = [f"rank {r.rank}: {p}" for r in mine for p in r.problems]
        twice = [gpu for gpu, count in Counter(r.gpu for r in mine if r.gpu).items() if count > 1]
        problems += [f"GPU {gpu} was given to several ranks" for gpu in twice]
        verdict = {"node": node, "ok": not problems, "time": time.time(), "ranks": [asdict(r) for r in mine]}
        write_json(run / "preflight" / life / f"{node}.json", {**verdict, "problems": problems})
        if problems:
            lines.append(f"node {node} failed its preflight ({'; '.join(problems)})")
    return lines


def _gather(store: Any, world: int, bound_s: float) -> list[Report]:
    """Reports in the order they come: all, or those that came in time, or up to the first bad one."""
    deadline = time.monotonic() + bound_s
    reports: dict[int, Report] = {}
    while len(reports) < world and time.monotonic() < deadline:
        for rank in set(range(world)) - set(reports):
            if store.check([f"preflight/{rank}"]):
                reports[rank] = Report(**json.loads(store.get(f"preflight/{rank}")))
        if any(r.problems for r in reports.values()):
            break
        time.sleep(0.1)
    return list(reports.values())


def _holds_what_is_written(folder: Path, rank: int) -> str | None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".write-test-{os.uname().nodename}-{rank}-{os.getpid()}"
    data = os.urandom(4096)
    try:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return None if path.read_bytes() == data else "reads back other bytes than were written"
    finally:
        path.unlink(missing_ok=True)


def _see_gpu(report: Report, local_rank: int) -> str | None:
    import torch

    seen = torch.cuda.device_count()
    if local_rank >= seen:
        return f"{seen} visible, number {local_rank} is wanted"
    report.gpu = str(torch.cuda.get_device_properties(local_rank).uuid)
    return None


def _multiply(device: str, n: int) -> str | None:
    """Freivalds' check: A and B hold 1..7, so that float32 sums of TF32 products are exact; then (AB)x = A(Bx)."""
    import torch

    generator = torch.Generator().manual_seed(n)
    a, b, x = (torch.randint(1, 8, shape, generator=generator) for shape in ((n, n), (n, n), (n, 1)))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # through the tensor cores
    try:
        product = (a.float().to(device) @ b.float().to(device)).long().cpu()
    finally:
        torch.set_float32_matmul_precision(before)
    return None if torch.equal(product @ x, a @ (b @ x)) else "wrong result"
