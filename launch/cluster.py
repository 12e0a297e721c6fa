"""Clusters: a YAML file of facts becomes a submitit executor; jobs are submitted, counted and looked up here."""

import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launch import slurm
from stablerep.runtime.config import key, merge
from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import data_folder, freeze_code, read_jsonl, record_submission

LOCAL_MINUTES = 60 * 24 * 365  # on this machine nobody stops a job for its length


@dataclass
class ClusterConfig:
    """Facts of a cluster; they live in configs/cluster/*.yaml and nowhere else."""

    kind: str = key("slurm", "slurm | local (this machine)")
    partition: str | None = key(None, "partition")
    account: str | None = key(None, "account")
    qos: str | None = key(None, "quality of service")
    constraint: str | None = key(None, "node features")
    exclude: str | None = key(None, "nodes never to use")
    minutes: int = key(240, "wall time of one job; work goes on in the next life of a job")
    gpus_per_node: int = key(1, "GPUs a node; 0 for CPU nodes")
    device: str | None = key(
        None, "name of its GPUs (nvidia-smi -L), or a word of it such as A100, for estimates; CPU nodes: of the CPU"
    )
    price_per_gpu_hour: float | None = key(None, "for estimates")
    currency: str = key("", "of that price, such as EUR")
    cpus_per_task: int = key(4, "CPUs a task (one task a GPU)")
    mem_gb: float | None = key(None, "memory a node, GB (default: the partition's)")
    signal_lead_s: int = key(120, "seconds before the end of the wall time at which a job is warned")
    max_array_size: int | None = key(None, "Slurm's MaxArraySize (default: ask scontrol)")
    scratch: str | None = key(None, "node-local folder for caches; the node fills in variables (default: its temporary folder)")
    setup: list[str] = key([], "shell lines before the work starts (modules, environment)")
    extra: dict[str, str] = key({}, "further sbatch options, such as {reservation: team}")


def load_cluster(name: str, gpus_per_node: int | None = None, submitting: bool = True) -> ClusterConfig:
    """The cluster that `--cluster` names; `gpus_per_node` replaces the file's. Raises UsageError, also where there is no
    sbatch to submit with."""
    if name == "auto":
        name = "slurm" if shutil.which("sbatch") else "local"
    folder = data_folder("configs") / "cluster"
    known = sorted(p.stem for p in folder.glob("*.yaml"))
    path = folder / f"{name}.yaml" if name in known else Path(name)
    if not path.is_file():
        raise UsageError(f"--cluster {name}: neither one of {', '.join(known)} nor a file")
    cluster = merge(ClusterConfig, [str(path)], {})
    if cluster.kind not in ("slurm", "local"):
        raise UsageError(f"{path}: kind must be slurm or local")
    if submitting and cluster.kind == "slurm" and not shutil.which("sbatch"):
        raise UsageError(f"--cluster {name} is a Slurm cluster and there is no sbatch here: use --cluster local")
    if cluster.signal_lead_s > 30 * cluster.minutes:
        raise UsageError(f"{path}: signal_lead_s {cluster.signal_lead_s} is more than half of {cluster.minutes} minutes")
    if gpus_per_node is not None:
        cluster = replace(cluster, gpus_per_node=gpus_per_node)
    return cluster


def within(cluster: ClusterConfig, minutes: int) -> ClusterConfig:
    """The cluster for a short job: at most `minutes` of wall time, warned no earlier than half-way."""
    minutes = min(cluster.minutes, minutes)
    return replace(cluster, minutes=minutes, signal_lead_s=min(cluster.signal_lead_s, 30 * minutes))


@dataclass
class Shape:
    """What one job asks for."""

    name: str
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    on_failure: list[str] = field(
        default_factory=list
    )  # Slurm: the batch script runs it, and srun's exit code, when srun failed
    after: list[str] = field(default_factory=list)  # Slurm: ids of jobs that must have ended, however they ended
    at_most: int | None = None  # of many jobs: how many run at once


def submit(cluster: ClusterConfig, run: Path, shape: Shape, tasks: list[Callable[[], Any]], fresh: bool) -> list[str]:
    """Submit one job a task and return their ids; many go as arrays no longer than MaxArraySize.

    What was submitted is appended to jobs.jsonl. Raises UsageError where sbatch refuses; a `fresh` run folder (made by
    this very command) is then removed again.
    """
    from submitit.core.utils import FailedJobError

    logs = run / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    code = freeze_code(run)
    ids: list[str] = []
    with _environment(code), _detached(logs) if cluster.kind == "local" else nullcontext():
        for part, chunk in _arrays(cluster, shape, tasks):
            executor = _executor(cluster, run, part)
            try:
                with redirect_stderr(said := io.StringIO()), executor.batch():
                    jobs = [executor.submit(task) for task in chunk]
                ids += (new := [job.job_id for job in jobs])
            except (FailedJobError, subprocess.CalledProcessError) as error:
                if fresh and not ids:
                    shutil.rmtree(run)
                reason = _sbatch_reason(f"{error} {getattr(error, 'output', '')} {said.getvalue()}")
                raise UsageError(f"Slurm refused the job: {reason}") from None
            record_submission(run, kind=cluster.kind, name=shape.name, jobs=new, nodes=shape.nodes, code=code.name)
    return ids


def render_scripts(cluster: ClusterConfig, run: Path, shape: Shape, jobs: int) -> list[str]:
    """The exact sbatch scripts that `submit` would write, one an array; none on this machine."""
    if cluster.kind == "local":
        return []
    scripts = []
    for part, chunk in _arrays(cluster, shape, [None] * jobs):
        executor = _executor(cluster, run, part)._executor
        if len(chunk) > 1:
            executor.parameters["map_count"] = len(chunk)
        scripts.append(executor._make_submission_file_text(executor._submitit_command_str, "UID"))
    return scripts


def still_active(run: Path, name: str) -> list[str]:
    """Ids of this run's jobs called `name` that are queued or running. Raises WorkError where Slurm does not answer."""
    return all_active({run: name})[run]


def all_active(runs: dict[Path, str]) -> dict[Path, list[str]]:
    """`still_active` of many runs, with one question to Slurm; `runs` says the name of each one's jobs."""
    records = {run: [r for r in read_jsonl(run / "jobs.jsonl") if r.get("name") == name] for run, name in runs.items()}
    everything = [r for found in records.values() for r in found]
    asked = {job.split("_")[0] for r in everything if r["kind"] != "local" for job in r["jobs"]}
    listed = slurm.queued(sorted(asked)) if asked else set()

    def at_work(run: Path, kind: str, job: str) -> bool:
        return _is_local_job(int(job), run) if kind == "local" else job in listed

    return {run: [job for r in found for job in r["jobs"] if at_work(run, r["kind"], job)] for run, found in records.items()}


def nudge(run: Path, name: str) -> None:
    """End the wait that Slurm puts before a requeued job of this run; nothing where there is no Slurm or no such job."""
    if jobs := _slurm_jobs(run, name):
        slurm.nudge(jobs)


def cancel_waiting(run: Path, name: str) -> None:
    """Cancel those of this run's jobs that wait, for their first life or for another one."""
    if jobs := _slurm_jobs(run, name):
        slurm.client("scancel", "--state=PENDING", *sorted({job.split("_")[0] for job in jobs}))


def _slurm_jobs(run: Path, name: str) -> list[str]:
    records = [r for r in read_jsonl(run / "jobs.jsonl") if r["kind"] == "slurm" and r.get("name") == name]
    return [job for r in records for job in r["jobs"]]


def watch_jobs(run: Path, name: str) -> bool:
    """`nudge`, and whether a job of this run is queued or running. Raises WorkError where Slurm does not answer."""
    nudge(run, name)
    return bool(still_active(run, name))


def _arrays(cluster: ClusterConfig, shape: Shape, tasks: list[Any]) -> Iterator[tuple[Shape, list[Any]]]:
    """Cut tasks into arrays that Slurm takes; each gets its part of `shape.at_most`. Raises UsageError where a part is 0."""
    size = 1 if cluster.kind == "local" else _max_array_size(cluster)
    chunks = [tasks[i : i + size] for i in range(0, len(tasks), size)]
    if shape.at_most is None or cluster.kind == "local":
        yield from ((shape, chunk) for chunk in chunks)
        return
    if shape.at_most < len(chunks):
        raise UsageError(f"--max-running {shape.at_most} is less than the {len(chunks)} arrays of at most {size} jobs")
    for i, chunk in enumerate(chunks):
        yield replace(shape, at_most=(shape.at_most + len(chunks) - 1 - i) // len(chunks)), chunk


def _max_array_size(cluster: ClusterConfig) -> int:
    if cluster.max_array_size is not None:
        return cluster.max_array_size
    shown = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True).stdout
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown, re.M)
    return int(found[1]) if found else 1001


def _executor(cluster: ClusterConfig, run: Path, shape: Shape) -> Any:
    import submitit

    executor = submitit.AutoExecutor(folder=run / "logs", cluster=cluster.kind)
    executor.update_parameters(
        name=shape.name,
        tasks_per_node=shape.tasks_per_node,
        gpus_per_node=shape.gpus_per_node,
        nodes=shape.nodes,
        timeout_min=cluster.minutes if cluster.kind == "slurm" else LOCAL_MINUTES,
        stderr_to_stdout=True,
    )
    if cluster.kind == "local":
        return executor
    many = shape.nodes * shape.tasks_per_node > 1
    options: dict[str, Any] = {"requeue": True, **cluster.extra}
    if cluster.exclude:
        options["exclude"] = cluster.exclude
    if shape.after:
        options["dependency"] = "afterany:" + ":".join(shape.after)
    executor.update_parameters(
        cpus_per_task=cluster.cpus_per_task,
        slurm_signal_delay_s=cluster.signal_lead_s,
        slurm_array_parallelism=shape.at_most or 1 << 20,
        slurm_additional_parameters=options,
        slurm_setup=cluster.setup or None,
        # srun does not inherit --cpus-per-task; one dead rank of a training job ends the others.
        slurm_srun_args=[f"--cpus-per-task={cluster.cpus_per_task}", *(["--kill-on-bad-exit=1"] if many else [])],
    )
    named = {"partition": cluster.partition, "account": cluster.account, "qos": cluster.qos}
    named["constraint"] = cluster.constraint
    executor.update_parameters(**{f"slurm_{k}": v for k, v in named.items() if v})
    if shape.on_failure:
        lines = ["code=$?", f"[ $code = 0 ] || {shlex.join(shape.on_failure)} $code", "exit $code"]
        executor.update_parameters(slurm_teardown=lines)
    if cluster.mem_gb:
        executor.update_parameters(mem_gb=cluster.mem_gb)
    if not shape.gpus_per_node:
        executor._executor.parameters.pop("gpus_per_node", None)
    return executor


@contextmanager
def _environment(code: Path) -> Iterator[None]:
    """The environment that jobs inherit: the frozen code first, nothing of a job that we may be inside of."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SBATCH_", "SUBMITIT_")) and name != "SLURM_CONF":
            del os.environ[name]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(code), *filter(None, [before.get("PYTHONPATH")])])
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _detached(logs: Path) -> Iterator[None]:
    """Processes started here outlive us: they ignore Ctrl-C and hold neither our terminal nor a pipe behind it."""
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    kept = [os.dup(1), os.dup(2)]
    log = os.open(logs / "controller.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    sys.stdout.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        for number, descriptor in enumerate(kept, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.close(log)
        signal.signal(signal.SIGINT, old)


def _sbatch_reason(text: str) -> str:
    reasons = re.findall(r"sbatch: (?:error: )?(.+)", text)
    return "; ".join(dict.fromkeys(r.strip() for r in reasons)) or text.strip().splitlines()[-1]


def _is_local_job(pid: int, run: Path) -> bool:
    """Whether a process works on this run: process ids come again, and a run may be copied."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        return state != "Z" and str(run.resolve() / "logs").encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
