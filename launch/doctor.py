"""Check a cluster against what the toolkit relies on: python launch/doctor.py [--cluster C] [--model M]"""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: sys.path[0] is this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from stablerep.runtime.config import key, parse, run_command
from stablerep.runtime.errors import UsageError

if TYPE_CHECKING:
    from launch.checks import Finding
    from launch.cluster import ClusterConfig, Shape

ABOUT = "Check the cluster before any GPU hour is spent: one line a check, ok, warn or fail, and one small job."


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
    from generation.settings import model_here
    from launch.cluster import load_cluster

    cluster = load_cluster(config.cluster, config.gpus_per_node)
    model = None if config.model is None else model_here(config.model)
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
    from launch.doctor_job import JOB, run_probe
    from launch.doctor_probe import ProbeTask
    from launch.slurm import client

    if config.model is not None and model is None:
        do = "generate.py fetches it once, where there is a network"
        yield Finding("fail", f"model {config.model} is not in the hub's cache here", do)
    for place in dict.fromkeys((out, Path.home())):
        yield from judge_space(place)
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
    folder, world = config.folder or str(out / "shared"), shape.nodes * shape.tasks_per_node
    task = ProbeTask(str(out), folder, world, gpus, cluster.scratch, model)
    yield from run_probe(cluster, shape, task, config.patience_s)


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
        level, missing = ("fail", f"no partition {name}") if name else ("warn", "no default partition, none in the file")
        yield Finding(level, missing, known)
    one = Shape("generate", 1, shape.tasks_per_node, shape.gpus_per_node)
    for what, asked in (("one node", one), (f"{shape.nodes} nodes", shape)):
        script = out / "test-only.sh"
        script.write_text(render_scripts(cluster, out, asked, 1)[0])
        said = client("sbatch", "--test-only", str(script))
        yield judge_test_only(what, said.returncode, said.stderr)
    said = client("sacct", "-n", "-X")
    yield judge_accounting(said.returncode, said.stderr)


if __name__ == "__main__":
    run_command(main)
