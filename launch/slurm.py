"""What we ask of Slurm, with its own command-line clients."""

import os
import re
import signal
import subprocess
import time
from datetime import datetime

from stablerep.runtime.errors import WorkError

SETTLE_S = 5
PATIENCE_S = 60.0  # for a controller that is being restarted
NO_ANSWER = re.compile("Unable to contact slurm controller|Socket timed out")
WAITING_OR_RUNNING = "PENDING,RUNNING,COMPLETING,CONFIGURING,SUSPENDED"


def client(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a Slurm client that outlives TERM, which a requeue sends to every process of the job."""
    try:
        return subprocess.run(
            words, capture_output=True, text=True, preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN)
        )
    except FileNotFoundError as error:
        return subprocess.CompletedProcess(words, 127, "", f"{error.filename}: not found")


def patient_client(*words: str) -> subprocess.CompletedProcess[str]:
    """`client`, again and again while the controller does not answer, for PATIENCE_S."""
    until = time.monotonic() + PATIENCE_S
    while True:
        result = client(*words)
        if not NO_ANSWER.search(result.stderr) or time.monotonic() > until:
            return result
        time.sleep(1.0)


def own_job() -> str | None:
    """The id of the job that we are in (`12`, or `12_3` for an element of an array); None outside Slurm."""
    env = os.environ
    array = env.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{env['SLURM_ARRAY_TASK_ID']}" if array else env.get("SLURM_JOB_ID")


def own_node() -> str:
    """This node, as Slurm calls it."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def own_nodes() -> list[str]:
    """The nodes of this job in the order of the ranks."""
    listed = os.environ.get("SLURM_JOB_NODELIST")
    return (client("scontrol", "show", "hostnames", listed).stdout.split() if listed else []) or [own_node()]


def own_end() -> float | None:
    """Unix time at which the wall time of this job ends; None where there is no limit or Slurm does not say."""
    if "SLURM_JOB_END_TIME" in os.environ:
        return float(os.environ["SLURM_JOB_END_TIME"])
    job = own_job()
    said = client("squeue", "-h", "-j", job, "-o", "%e").stdout.strip() if job else ""
    try:
        return datetime.fromisoformat(said).timestamp()
    except ValueError:  # N/A, or no answer
        return None


def state(job: str) -> str:
    """RUNNING, COMPLETING, PENDING ...; empty where Slurm does not know the job."""
    return patient_client("squeue", "-h", "-j", job, "-o", "%T").stdout.strip()


def exclude_nodes(job: str, nodes: list[str]) -> str | None:
    """Keep a requeued job off these nodes, beside those it avoids already; the reason where Slurm refuses.

    Slurm takes this once the requeue was asked for, while the old processes are still ending.
    """
    shown = client("scontrol", "show", "job", job).stdout
    old = re.search(r"ExcNodeList=(\S+)", shown)
    avoided = [] if old is None or old[1] == "(null)" else [old[1]]
    result = client("scontrol", "update", f"jobid={job}", f"ExcNodeList={','.join([*avoided, *nodes])}")
    return result.stderr.strip() if result.returncode else None


def queued(jobs: list[str]) -> set[str]:
    """Of these job ids, the elements that Slurm still has to run or is running (`12` or `12_3`). Raises WorkError."""
    result = client("squeue", "-h", "-r", "-o", "%i", "-t", WAITING_OR_RUNNING, "-j", ",".join(jobs))
    if result.returncode and "Invalid job id" not in result.stderr:
        reason = result.stderr.strip().splitlines()[-1] if result.stderr.strip() else "squeue failed"
        raise WorkError(f"Slurm does not answer ({reason}); the run folder is safe, try again")
    return set(result.stdout.split())


def nudge(jobs: list[str]) -> list[str]:
    """Cut to a few seconds the two minutes that Slurm lets a requeued job wait, for those of `jobs` that wait; returns them.

    A job cannot do this for itself: Slurm sets the wait when the last process is gone. Where the user may not, nothing
    happens. The few seconds stay, so that no node takes the new life's credential for the one that it has just revoked.
    An administrator shortens the wait for all with AuthInfo=cred_expire=SECONDS in slurm.conf.
    """
    columns = "JobArrayID:40,RestartCnt:12,Reason:40,StartTime:24"
    listed = client("squeue", "-h", "-r", "-t", "PENDING", "-O", columns, "-j", ",".join(jobs))
    waiting = []
    for row in (line.split() for line in listed.stdout.splitlines()):
        if len(row) == 4 and row[1] != "0" and row[2] == "BeginTime" and _seconds_until(row[3]) > 2 * SETTLE_S:
            waiting.append(row[0])
    start = f"StartTime=now+{SETTLE_S}"
    return [job for job in waiting if client("scontrol", "update", f"jobid={job}", start).returncode == 0]


def _seconds_until(said: str) -> float:
    try:
        return datetime.fromisoformat(said).timestamp() - time.time()
    except ValueError:  # N/A
        return 0.0
