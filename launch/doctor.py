"""Check a cluster against what the toolkit relies on: python launch/doctor.py [--cluster C] [--model M]"""

import contextlib
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: sys.path[0] is this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from stablerep.runtime.config import key, parse, run_command
from stablerep.runtime.errors import UsageError, WorkError

if TYPE_CHECKING:
    from launch.checks import Finding
    from launch.cluster import ClusterConfig, Shape
    from launch.doctor_probe import Found

ABOUT = "Check the cluster before any GPU hour is spent: one line a check, ok, warn or fail, and one small job."
JOB = "doctor"
PROBE_MINUTES = 10
RUN_S = 300.0  # from the start of the job to its last report; imports from a cold file system are slow


@dataclass
class DoctorConfig:
    """What is checked."""

    cluster: str = key("auto", "auto (Slurm if sbatch is there, else this machine) | local | NAME in configs/cluster | FILE")
    nodes: int = key(2, "nodes of the probe job (on this machine: processes)")
    gpus_per_node: int | None = key(None, "GPUs a node, 0 for CPU (default: what the cluster file says)")
    out: str | None = key(None, "where the probe writes; is kept (default: a new folder here, removed in the end)")
    folder: str | None = key(None, "the shared folder to check, the node fills in variables (default: inside --out)")
    model: str | None = key(None, "also check that this model is there: tiny, a folder, or a hub id that was fetched")
    patience_s: float = key(300.0, "how long the probe job may wait in the queue")


def main(argv: list[str]) -> int:
    """Print the findings as they come; 0 where none is a fail, else 1."""
    config = parse(DoctorConfig, argv, prog="doctor.py", about=ABOUT)
    if config.nodes < 1:
        raise UsageError("--nodes must be at least 1")
    from launch.cluster import load_cluster

    cluster = load_cluster(config.cluster, config.gpus_per_node)
    model = _model_folder(config.model)
    if config.out is not None and Path(config.out).exists() and any(Path(config.out).iterdir()):
        raise UsageError(f"--out {config.out} is not empty")
    out = Path(config.out or tempfile.mkdtemp(prefix="doctor-", dir=".")).resolve()
    failed = 0
    try:
        out.mkdir(parents=True, exist_ok=True)
        for finding in check(config, cluster, out, model):
            print(finding, flush=True)
            failed += finding.level == "fail"
    finally:
        if config.out is None:
            shutil.rmtree(out, ignore_errors=True)
    print(f"{failed} checks failed" if failed else "nothing failed")
    return 1 if failed else 0


def check(config: DoctorConfig, cluster: "ClusterConfig", out: Path, model: str | None) -> "Iterator[Finding]":
    """All findings, the cheap ones first; where sbatch refuses, no job is tried."""
    from launch.checks import Finding, judge_quota, judge_space
    from launch.cluster import Shape
    from launch.slurm import client

    if config.model is not None and model is None:
        do = "generate.py fetches it once, where there is a network"
        yield Finding("fail", f"model {config.model} is not in the hub's cache here", do)
    for folder in dict.fromkeys((out, Path.home())):
        yield from judge_space(folder)
    quota = client("quota", "-q")
    yield from judge_quota(quota.returncode, quota.stdout)
    slurm, gpus = cluster.kind == "slurm", cluster.gpus_per_node
    shape = Shape(JOB, config.nodes, max(1, gpus), gpus) if slurm else Shape(JOB, 1, max(gpus, config.nodes), gpus)
    if slurm:
        refused = False
        for finding in _ask_slurm(cluster, out, shape):
            refused = refused or finding.level == "fail"
            yield finding
        if refused:
            yield Finding("fail", "the nodes were not checked", "First mend what failed above")
            return
    yield from _probe(config, cluster, out, shape, model)


def _ask_slurm(cluster: "ClusterConfig", out: Path, shape: "Shape") -> "Iterator[Finding]":
    """What Slurm answers without running a job."""
    from launch.checks import Finding, fields, judge_accounting, judge_settings, judge_test_only, settings
    from launch.cluster import Shape, render_scripts
    from launch.slurm import client

    shown = client("scontrol", "show", "config")
    if shown.returncode:
        yield Finding("fail", f"Slurm does not answer: {shown.stderr.strip()}", "Is this a login node? Is SLURM_CONF right?")
        return
    config = settings(shown.stdout)
    yield Finding("ok", f"Slurm {config.get('SLURM_VERSION', '?')} of cluster {config.get('ClusterName', '?')} answers")
    listed = client("scontrol", "-o", "show", "partition").stdout.splitlines()
    parts = {p["PartitionName"]: p for p in map(fields, listed) if "PartitionName" in p}
    default = next((name for name, p in parts.items() if p.get("Default") == "YES"), None)
    name = (cluster.partition or default or "").split(",")[0]
    if name in parts:
        yield from judge_settings(config, parts[name], cluster)
    else:
        known = f"There are {', '.join(parts)}"
        missing = f"no partition {name}" if name else "no default partition, and the cluster file names none"
        yield Finding("fail", missing, known)
    one = Shape("generate", 1, shape.tasks_per_node, shape.gpus_per_node)
    for what, asked in (("one node", one), (f"{shape.nodes} nodes", shape)):
        script = out / "test-only.sh"
        script.write_text(render_scripts(cluster, out, asked, 1)[0])
        said = client("sbatch", "--test-only", str(script))
        yield judge_test_only(what, said.returncode, said.stderr)
    said = client("sacct", "-n", "-X")
    yield judge_accounting(said.returncode, said.stderr)


def _probe(config: DoctorConfig, cluster: "ClusterConfig", out: Path, shape: "Shape", model: str | None) -> "Iterator[Finding]":
    """Run the probe job and judge its reports; the job is cancelled whatever happens."""
    from launch import checks
    from launch.cluster import submit
    from launch.doctor_probe import ProbeTask, fingerprint_of, versions

    world = shape.nodes * shape.tasks_per_node
    folder = config.folder or str(out / "shared")
    task = ProbeTask(str(out), folder, world, cluster.gpus_per_node, cluster.scratch, model)
    minutes = min(cluster.minutes, PROBE_MINUTES)
    short = replace(cluster, minutes=minutes, signal_lead_s=min(cluster.signal_lead_s, 30 * minutes))
    try:
        job = submit(short, out, shape, [task], False)[0]
    except UsageError as error:
        yield checks.Finding("fail", str(error), "Mend the cluster file")
        return
    print(f"      probe job {job}: {world} tasks", file=sys.stderr)
    try:
        pending = _await_start(out, job, cluster.kind == "slurm", config.patience_s)
        if pending:
            why = f"probe job {job} still waits after {config.patience_s:.0f} s ({pending}): the nodes were not checked"
            yield checks.Finding("fail", why, "Try again later, or with a longer --patience-s")
            return
        found = _gather(out, "reports", world)
        yield from checks.judge_nodes(found, world, cluster.gpus_per_node)
        yield from checks.judge_sharing(found, world)
        yield from checks.judge_packages(found, platform.python_version(), versions())
        if model is not None:
            yield from checks.judge_model(found, model, fingerprint_of(model))
        if not found:
            yield checks.Finding("fail", f"job {job} ended with: {_last_word(out)}", "Keep its logs with --out")
            return
        _warn(job, found, cluster.kind == "slurm")
        yield checks.judge_signals(_gather(out, "signalled", world), world)
        (out / "end").touch()
        if cluster.kind == "slurm":
            yield from _requeue(out, job)
    finally:
        _cancel(out, job, cluster.kind == "slurm")


def _await_start(out: Path, job: str, on_slurm: bool, patience_s: float) -> str | None:
    """Wait until the job runs or has gone; else why it waits."""
    from launch.doctor_probe import wait
    from launch.slurm import client

    def waiting() -> str:
        return client("squeue", "-h", "-j", job, "-t", "PENDING,CONFIGURING", "-o", "%r").stdout.strip() if on_slurm else ""

    return None if wait(lambda: not waiting(), patience_s) else waiting()


def _gather(out: Path, name: str, world: int) -> "list[Found]":
    """Reports of all tasks, or those that came before the job ended or RUN_S was over."""
    from launch.cluster import still_active
    from launch.doctor_probe import Found, wait
    from launch.progress import Every
    from stablerep.runtime.rundir import read_json

    gone = Every(3.0, lambda: not still_active(out, JOB))

    def count() -> int:
        return len(list((out / name).glob("[0-9]*.json")))

    wait(lambda: count() == world or gone(), RUN_S)
    time.sleep(0 if count() == world else 2)  # the last report of a job that has just ended
    return sorted((Found(**read_json(path)) for path in (out / name).glob("[0-9]*.json")), key=lambda f: f.rank)


def _last_word(out: Path) -> str:
    """The last line that the job wrote."""
    logs = sorted((out / "logs").glob("*.out"), key=lambda p: p.stat().st_size)
    lines = logs[-1].read_text(errors="replace").split("\n") if logs else []
    return next((line for line in reversed(lines) if line.strip()), "no log that this machine sees")


def _warn(job: str, found: "list[Found]", on_slurm: bool) -> None:
    """USR1 to every task, as Slurm sends it ahead of the end of the wall time."""
    from launch.slurm import client

    if on_slurm:
        client("scancel", "--signal=USR1", job)
        return
    for f in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(f.pid, signal.SIGUSR1)


def _requeue(out: Path, job: str) -> "Iterator[Finding]":
    """The job asked Slurm from its node to run it again: does it wait for its next life, and may that wait be ended?"""
    from launch.checks import Finding
    from launch.doctor_probe import wait
    from launch.slurm import client, nudge
    from stablerep.runtime.rundir import read_json

    asked = out / "requeue.json"
    wait(asked.exists, 60.0)
    answer = read_json(asked) if asked.exists() else {"code": 1, "said": "no answer within 60 s"}

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
    from launch.cluster import still_active
    from launch.doctor_probe import wait
    from launch.slurm import client

    (out / "end").touch()
    if on_slurm:
        client("scancel", job)
    with contextlib.suppress(WorkError):
        wait(lambda: not still_active(out, JOB), 60.0)


def _model_folder(model: str | None) -> str | None:
    """The folder of a model that is here; None where a hub id was not fetched. Raises UsageError."""
    if model is None:
        return None
    from generation.settings import TINY

    path = TINY if model == "tiny" else Path(model).expanduser()
    if path.exists() or model.count("/") != 1:
        if not (path / "model_index.json").exists():
            raise UsageError(f"--model {model} is neither a diffusers folder (with model_index.json) nor a hub id")
        return str(path.resolve())
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return str(snapshot_download(model, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


if __name__ == "__main__":
    run_command(main)
