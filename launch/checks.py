"""What doctor.py makes of what it found: each check turns answers of Slurm or reports of nodes into lines."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.cluster import ClusterConfig
from launch.doctor_probe import RACES, Found

GIGABYTE = 1e9
FREE_GB, FREE_FILES = 20.0, 100_000
SKEW_WARN_S, SKEW_FAIL_S = 2.0, 60.0


@dataclass
class Finding:
    """One line of the doctor: `level` is ok, warn or fail; `do` says what to do."""

    level: str
    what: str
    do: str = ""

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.what}{f'. {self.do}' if self.do else ''}"


def fields(shown: str) -> dict[str, str]:
    """`Key=value` and `Key = value` pairs of what scontrol shows."""
    return {k: v.strip() for k, v in re.findall(r"(\w+)\s*=\s*(.*?)(?=\s+\w+\s*=|\n|$)", shown)}


def settings(shown: str) -> dict[str, str]:
    """The lines of `scontrol show config`."""
    pairs = (line.split("=", 1) for line in shown.splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def judge_settings(config: dict[str, str], partition: dict[str, str], cluster: ClusterConfig) -> Iterator[Finding]:
    """What slurm.conf and the partition mean for a run."""
    array = int(config.get("MaxArraySize", "1001"))
    wanted = cluster.max_array_size
    if wanted is not None and wanted > array:
        yield Finding("fail", f"MaxArraySize is {array}, the cluster file says {wanted}", "Take max_array_size out of the file")
    else:
        yield Finding("ok", f"MaxArraySize {array}: longer arrays are split")
    if config.get("JobRequeue") == "0":
        yield Finding("warn", "JobRequeue=0", "Jobs are submitted with --requeue and come back if that is allowed: see below")
    else:
        yield Finding("ok", "JobRequeue=1: jobs may be requeued")
    wait = re.search(r"cred_expire=(\d+)", config.get("AuthInfo", ""))
    seconds = int(wait[1]) if wait else 120
    more = "Slurm lets a requeued job wait for so long; --wait and status.py --watch end the wait where users may"
    yield Finding("ok" if seconds <= 60 else "warn", f"AuthInfo cred_expire is {seconds} s", "" if seconds <= 60 else more)
    age = _seconds(config.get("MinJobAge", "300"))
    forgets = "A finished job is forgotten so soon that scripts may miss it; the run folder says how it ended"
    yield Finding("ok" if age >= 60 else "warn", f"MinJobAge {age} s", "" if age >= 60 else forgets)
    kill = _seconds(config.get("KillWait", "30"))
    short = "After TERM a batch of images or a step must end within this time, or its work is done again"
    yield Finding("ok" if kill >= 30 else "warn", f"KillWait {kill} s", "" if kill >= 30 else short)
    yield judge_preemption(config, partition)
    limit = _minutes(partition.get("MaxTime", "UNLIMITED"))
    name = partition.get("PartitionName", "?")
    if limit is not None and cluster.minutes > limit:
        why = f"partition {name} allows {limit} minutes, the cluster file asks for {cluster.minutes}"
        yield Finding("fail", why, "Lower `minutes`: work goes on in the next life of a job")
    if partition.get("State", "UP") != "UP":
        yield Finding("fail", f"partition {name} is {partition['State']}", "Choose another, or wait: sinfo -s")


def judge_preemption(config: dict[str, str], partition: dict[str, str]) -> Finding:
    """Whether jobs here are preempted, and with what warning."""
    mode = partition.get("PreemptMode", config.get("PreemptMode", "OFF")).split(",")[-1]
    grace = _seconds(partition.get("GraceTime", "0"))
    if config.get("PreemptType", "preempt/none") == "preempt/none" or mode == "OFF":
        return Finding("ok", "no preemption here")
    signal = "preempt_send_user_signal" in config.get("SlurmctldParameters", "")
    warned = f"{'the user signal' if signal else 'TERM'} comes {grace} s (GraceTime) before the end"
    if mode == "CANCEL":
        again = "Slurm cancels what it preempts: jobs requeue themselves if they are warned; else give the same command again"
        return Finding("warn", f"PreemptMode CANCEL, {warned}", again)
    if mode in ("SUSPEND", "GANG"):
        return Finding("warn", f"PreemptMode {mode}", "A suspended worker loses its shard to another, which is harmless")
    short = "Without a warning the shard or the steps since the last checkpoint are done again"
    return Finding("ok" if grace >= 30 else "warn", f"PreemptMode {mode}, {warned}", "" if grace >= 30 else short)


def judge_test_only(name: str, code: int, said: str) -> Finding:
    """The answer of `sbatch --test-only`."""
    lines = [re.sub(r"^sbatch: (error: )?", "", line) for line in said.strip().splitlines()]
    if code:
        why = "; ".join(line.removeprefix("allocation failure: ") for line in lines) or "no reason given"
        return Finding("fail", f"sbatch refuses a job of {name}: {why}", "Mend the cluster file; sinfo says which nodes are up")
    when = next((m[1] for line in lines if (m := re.search(r"to start at (\S+)", line))), None)
    return Finding("ok", f"sbatch takes a job of {name}{f'; it would start at {when}' if when else ''}")


def judge_accounting(code: int, said: str) -> Finding:
    """The answer of sacct."""
    if code == 0:
        return Finding("ok", "accounting answers (sacct)")
    why = said.strip().splitlines()[0] if said.strip() else "sacct failed"
    return Finding("warn", f"no accounting: {why}", "The toolkit does not need it; jobs.jsonl and events/ tell what ran")


def judge_space(folder: Path) -> Iterator[Finding]:
    """Free bytes and inodes where `folder` lies."""
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize / GIGABYTE
    level = "ok" if free >= FREE_GB else "warn" if free >= 1 else "fail"
    yield Finding(level, f"{folder}: {free:.0f} GB free", "" if level == "ok" else "Free some, or choose another disk")
    if disk.f_files:  # some file systems do not count
        few = disk.f_favail < FREE_FILES
        yield Finding("warn" if few else "ok", f"{folder}: {disk.f_favail} inodes free", "Delete small files" if few else "")


def judge_quota(code: int, said: str) -> Iterator[Finding]:
    """The answer of `quota -q`, which ends with an error where a limit is passed; nothing where there is no quota."""
    if code and code != 127 and said.strip():
        yield Finding("warn", f"over quota: {' '.join(said.split())}", "Free some, or choose another disk")


def judge_nodes(found: list[Found], world: int, gpus: int) -> Iterator[Finding]:
    """What the tasks found on their nodes."""
    absent = sorted(set(range(world)) - {f.rank for f in found})
    if absent:
        yield Finding("fail", f"tasks {_list(absent)} of {world} did not report", "Do all nodes see --out?")
    for f in found:
        for problem in f.problems:
            yield Finding("fail", f"node {f.node}, task {f.rank}: {problem}", "Mend it, or name the node under `exclude`")
    if not any(f.problems for f in found):
        yield Finding("ok", f"scratch is writable and a matrix product right on {_list(_nodes(found))}")
    if gpus:
        twice = [gpu for gpu, n in Counter((f.node, f.gpu) for f in found if f.gpu).items() if n > 1]
        for node, gpu in twice:
            yield Finding("fail", f"node {node}: GPU {gpu} is seen by several tasks", "Ask for GPUs with --gpus-per-node")
        if not twice and all(f.gpu for f in found):
            yield Finding("ok", f"{len(found)} GPUs, one a task")
    lost = [f for f in found if f.unreached]
    for f in lost:
        why = f"node {f.node}, task {f.rank}: no TCP between it and task 0 ({f.unreached})"
        yield Finding("fail", why, "Training needs it: ask for the firewall between nodes")
    if found and not lost and all(len(f.peers) == world for f in found):
        yield Finding("ok", "the tasks reach each other by TCP")


def judge_sharing(found: list[Found], world: int) -> Iterator[Finding]:
    """Whether all nodes see one folder, and whether it keeps the promises that leases and commits rest on."""
    if not found:
        return
    alone = [f"{f.node} sees tasks {_list(f.peers)}" for f in found if len(f.peers) < world]
    if alone:
        yield Finding("fail", f"the folder is not shared: {'; '.join(alone)}", "Choose --out on a file system of all nodes")
        return
    yield Finding("ok", f"{world} tasks see one folder")
    for how, wins in (("new file (O_EXCL)", [f.created for f in found]), ("rename", [f.renamed for f in found])):
        winners = Counter(k for won in wins for k in won)
        wrong = sum(winners[k] != 1 for k in range(RACES))
        do = "Two workers would make one shard: harmless, but wasteful. Choose another file system" if wrong else ""
        said = f"had not one winner in {wrong} of {RACES} races" if wrong else f"has one winner in each of {RACES} races"
        yield Finding("fail" if wrong else "ok", f"a {how} {said}", do)
    torn = sum(f.torn for f in found)
    do = "Readers may see half-written files: choose another file system" if torn else ""
    yield Finding("fail" if torn else "ok", f"{torn} half-written files were seen while files were replaced", do)
    for f in {f.node: f for f in found}.values():
        off = abs(f.skew_s)
        level = "ok" if off <= SKEW_WARN_S else "warn" if off <= SKEW_FAIL_S else "fail"
        do = "" if level == "ok" else "Times in events are off by so much, and a job stops too late: set the clock (NTP)"
        yield Finding(level, f"node {f.node}: the file server's clock is {f.skew_s:+.2f} s off the node's", do)


def judge_packages(found: list[Found], python: str, here: dict[str, str]) -> Iterator[Finding]:
    """Packages of the nodes against those of this machine."""
    looked = [f for f in found if f.versions]
    problems = []
    for f in looked:
        problems += [f"node {f.node}: {broken} does not import" for broken in f.broken]
        theirs = {"python": f.python, **f.versions}
        other = [f"{k} {v} there, {w} here" for k, w in {"python": python, **here}.items() if (v := theirs.get(k)) != w]
        problems += [f"node {f.node}: {'; '.join(other)}"] if other else []
    do = "Point `setup` in the cluster file to the environment that this command runs in"
    yield from (Finding("fail", problem, do) for problem in problems)
    if looked and not problems:
        yield Finding("ok", f"packages import and are the same on {_list(_nodes(looked))}: torch {here['torch']}")


def judge_model(found: list[Found], model: str, here: str | None) -> Iterator[Finding]:
    """The model folder as the nodes see it."""
    for f in (f for f in found if f.versions):
        if f.model is None:
            yield Finding("fail", f"node {f.node}: no model in {model}", "Put it on a file system that all nodes see")
        elif f.model != here:
            yield Finding("fail", f"node {f.node}: {model} holds other files there", "Copy the model again")
        else:
            yield Finding("ok", f"node {f.node}: {model} is there, without a network")


def judge_signals(found: list[Found], world: int) -> Finding:
    """Whether the warning reached every task."""
    heard = [f.rank for f in found if f.signal == "SIGUSR1"]
    if len(heard) == world:
        return Finding("ok", f"USR1 reached all {world} tasks")
    deaf = sorted(set(range(world)) - set(heard))
    do = "Warned jobs would lose work: does `setup` start a shell that keeps signals?"
    return Finding("fail", f"USR1 did not reach tasks {_list(deaf)}", do)


def _nodes(found: list[Found]) -> list[str]:
    return sorted({f.node for f in found})


def _list(values: list[int] | list[str]) -> str:
    return ", ".join(map(str, values[:8])) + (f" and {len(values) - 8} more" if len(values) > 8 else "")


def _seconds(said: str) -> int:
    """`30 sec` and `30` as a number; 0 where there is none."""
    found = re.search(r"\d+", said)
    return int(found[0]) if found else 0


def _minutes(said: str) -> int | None:
    """Slurm's `[D-]HH:MM:SS` in whole minutes; None for UNLIMITED."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", said)
    return None if found is None else (int(found[1] or 0) * 24 + int(found[2])) * 60 + int(found[3])
