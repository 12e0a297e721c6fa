"""A private Slurm of several nodes on this machine: own folder, key, ports and processes; ended by pid.

All nodes share this host's name, loopback and file system (Debian's slurmd is built with multiple-slurmd).
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")


def missing(accounting: bool) -> list[str]:
    """Daemons that are not installed."""
    names = [*NEEDED, *(("slurmdbd", "mariadbd") if accounting else ())]
    return [n for n in names if not shutil.which(n, path=PATH)]


def free_ports(count: int) -> list[int]:
    """Ports that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Lab:
    """`with Lab(...) as lab`: all nodes idle; afterwards nothing is left running."""

    def __init__(self, nodes: int = 4, accounting: bool = False, max_array: int = 1001, gpus: int = 2) -> None:
        self.nodes, self.accounting, self.max_array, self.gpus = nodes, accounting, max_array, gpus
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: unix sockets
        self.conf = self.folder / "slurm.conf"
        self.env = {**os.environ, "SLURM_CONF": str(self.conf), "PATH": PATH}
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.slurmd: dict[str, subprocess.Popen[bytes]] = {}
        self.controller: subprocess.Popen[bytes]

    def __enter__(self) -> "Lab":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.call("scancel", "--full", "-u", str(os.getuid()))
        pids = self._job_processes()
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for pid in pids:
            self._kill(pid, signal.SIGKILL)
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in self._job_processes():
            self._kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a Slurm client."""
        return subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=60)

    def nudge(self) -> None:
        """Slurm lets a requeued job wait two minutes (BeginTime); end that wait."""
        listed = self.call("squeue", "-h", "-r", "-t", "PENDING", "-o", "%i %r").stdout
        for job, reason in (line.split(None, 1) for line in listed.splitlines()):
            if reason == "BeginTime":
                self.call("scontrol", "update", f"jobid={job}", "StartTime=now")

    def lose(self, node: str) -> None:
        """The node dies: its slurmd, the steps' managers and their processes, at once."""
        self._kill(self.slurmd[node].pid, signal.SIGKILL)
        self.slurmd[node].wait()
        mine = [p for p in self._job_processes() if f"SLURMD_NODENAME={node}" in self._environment(p)]
        managers = {int(Path(f"/proc/{p}/stat").read_text().rsplit(")", 1)[1].split()[1]) for p in mine}
        doomed = (managers & set(self._job_processes())) | set(mine)
        # All stop before the first dies: a manager that sees its task die tells the controller that the job has failed.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in doomed:
                self._kill(pid, number)

    @contextmanager
    def no_controller(self, number: int) -> Iterator[None]:
        """End slurmctld by a signal; afterwards start it on the state that it saved, and wait until it answers."""
        self.controller.send_signal(number)
        self.controller.wait()
        self.daemons.remove(self.controller)
        yield
        self.controller = self._spawn("slurmctld", "-D")
        self._await(lambda: self.call("sinfo").returncode == 0, 60, "controller that answers")

    def restore(self) -> None:
        """Cancel every job, start the slurmds that are gone, wait until every node is idle."""
        for node, daemon in self.slurmd.items():
            if daemon.poll() is not None:
                self.daemons.remove(daemon)
                self.slurmd[node] = self._spawn("slurmd", "-D", "-N", node)
        if not self._all_idle():
            self.call("scontrol", "update", f"nodename=node[1-{self.nodes}]", "state=resume")
        self._await(self._cleared, 120, "empty queue and idle nodes")

    def _cleared(self) -> bool:
        """Cancel what is queued, again at each poll (a job may just be requeueing itself); whether nothing is left."""
        self.call("scancel", "-u", str(os.getuid()))
        return self._all_idle() and not self.call("squeue", "-h").stdout

    def until(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        """Poll, nudging requeued jobs, until the condition holds."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                queue = self.call("squeue", "-r").stdout
                raise AssertionError(f"waited {seconds} s for {what}; the queue:\n{queue}")
            self.nudge()
            time.sleep(0.3)

    def _spawn(self, *words: str) -> subprocess.Popen[bytes]:
        with open(self.folder / "log" / f"{Path(words[0]).name}-{len(self.daemons)}.out", "ab") as log:
            daemon = subprocess.Popen(words, env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self.daemons.append(daemon)
        return daemon

    def _start(self) -> None:
        f = self.folder
        for name in ("log", "state", "munge", "gpu", *(f"spool.node{i}" for i in range(1, self.nodes + 1))):
            (f / name).mkdir()
        f.chmod(0o755)
        (f / "munge").chmod(0o700)
        key = f / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self._spawn(
            "munged", "-F", "--force", f"--key-file={key}", f"--socket={f}/munge.sock", f"--pid-file={f}/munged.pid",
            f"--log-file={f}/log/munged.log", f"--seed-file={f}/munge/seed",
        )  # fmt: skip
        self._await(lambda: (f / "munge.sock").exists(), 10, "munged")
        ports = free_ports(self.nodes + 3)
        user = subprocess.run(["id", "-un"], capture_output=True, text=True).stdout.strip()
        if self.accounting:
            self._start_database(user, ports[1], ports[2])
        self._write_conf(user, ports)
        if self.accounting:
            self._spawn("slurmdbd", "-D")
            self._await(lambda: self.call("sacctmgr", "-n", "show", "cluster").returncode == 0, 60, "slurmdbd")
            self.call("sacctmgr", "-i", "add", "cluster", "lab")
        self.controller = self._spawn("slurmctld", "-D", "-c")
        for i in range(1, self.nodes + 1):
            self.slurmd[f"node{i}"] = self._spawn("slurmd", "-D", "-N", f"node{i}")
        self._await(self._all_idle, 60, "nodes to be idle")
        if self.accounting:
            self.call("sacctmgr", "-i", "add", "account", "lab")
            self.call("sacctmgr", "-i", "add", "user", user, "account=lab", "defaultaccount=lab")

    def _start_database(self, user: str, dbd_port: int, sql_port: int) -> None:
        f = self.folder
        subprocess.run(
            ["mariadb-install-db", "--no-defaults", f"--user={user}", f"--datadir={f}/sql", "--skip-test-db",
             "--auth-root-authentication-method=normal"],
            check=True, capture_output=True, env=self.env,
        )  # fmt: skip
        self._spawn(
            "mariadbd", "--no-defaults", f"--user={user}", f"--datadir={f}/sql", f"--socket={f}/sql.sock",
            f"--pid-file={f}/sql.pid", "--bind-address=127.0.0.1", f"--port={sql_port}", "--skip-name-resolve",
            "--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900", "--performance-schema=OFF",
        )  # fmt: skip
        grant = "CREATE USER 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm'; GRANT ALL ON *.* TO 'slurm'@'127.0.0.1';"
        client = ["mariadb", "--no-defaults", "-uroot", f"--socket={f}/sql.sock", "-e"]
        self._await(lambda: self.call(*client, "SELECT 1").returncode == 0, 60, "mariadb")
        assert self.call(*client, grant).returncode == 0
        path = f / "slurmdbd.conf"
        path.write_text(
            f"AuthType=auth/munge\nAuthInfo=socket={f}/munge.sock\nDbdHost=localhost\nDbdPort={dbd_port}\n"
            f"SlurmUser={user}\nLogFile={f}/log/slurmdbd.log\nPidFile={f}/slurmdbd.pid\n"
            f"StorageType=accounting_storage/mysql\nStorageHost=127.0.0.1\nStoragePort={sql_port}\nStorageUser=slurm\n"
            "StoragePass=slurm\nStorageLoc=slurm_acct\nCommitDelay=0\n"
        )
        path.chmod(0o600)

    def _write_conf(self, user: str, ports: list[int]) -> None:
        f, host = self.folder, socket.gethostname().split(".")[0]
        accounting = "AccountingStorageType=accounting_storage/none"
        if self.accounting:
            accounting = (
                "AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=localhost\n"
                f"AccountingStoragePort={ports[1]}\nAccountingStoragePass={f}/munge.sock"
            )
        nodes = "\n".join(
            f"NodeName=node{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2 + i]} CPUs=4 RealMemory=8000 "
            f"Gres=gpu:{self.gpus} State=UNKNOWN"
            for i in range(1, self.nodes + 1)
        )
        for g in range(self.gpus):  # a device file that Slurm accepts and that is no GPU
            (f / "gpu" / f"nvidia{g}").symlink_to("/dev/null")
        (f / "gres.conf").write_text(f"Name=gpu File={f}/gpu/nvidia[0-{self.gpus - 1}]\n")
        self.conf.write_text(f"""ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={f}/munge.sock
StateSaveLocation={f}/state
SlurmdSpoolDir={f}/spool.%n
SlurmctldPidFile={f}/slurmctld.pid
SlurmdPidFile={f}/slurmd.%n.pid
SlurmctldLogFile={f}/log/slurmctld.log
SlurmdLogFile={f}/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0,bf_continue
ReturnToService=2
JobRequeue=1
MaxArraySize={self.max_array}
MinJobAge=300
KillWait=10
MessageTimeout=10
SlurmdTimeout=10
CompleteWait=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{accounting}
{nodes}
PartitionName=main Nodes=ALL Default=YES LLN=YES MaxTime=INFINITE DefaultTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL MaxTime=INFINITE DefaultTime=60 PriorityTier=10 PreemptMode=OFF
""")

    def _all_idle(self) -> bool:
        return len(set(self.call("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N").stdout.split())) == self.nodes

    def _await(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not condition():
            dead = [str(d.args) for d in self.daemons if d.poll() is not None]
            if dead or time.monotonic() > end:
                logs = "".join(p.read_text(errors="replace")[-800:] for p in (self.folder / "log").iterdir())
                raise RuntimeError(f"no {what}; dead: {dead}\n{logs}")
            time.sleep(0.1)

    def _job_processes(self) -> list[int]:
        """Steps and job processes of this lab: they carry its SLURM_CONF, and are no daemon of ours."""
        own = {d.pid for d in self.daemons} | {os.getpid()}
        found = []
        for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
            variables = self._environment(pid) if pid not in own else set()
            if f"SLURM_CONF={self.conf}" in variables:
                name = Path(f"/proc/{pid}/comm").read_text().strip() if Path(f"/proc/{pid}").exists() else ""
                if name.startswith(("slurmstepd", "srun")) or any(v.startswith("SLURM_JOB_ID=") for v in variables):
                    found.append(pid)
        return found

    @staticmethod
    def _environment(pid: int) -> set[str]:
        try:
            return set(Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0"))
        except OSError:
            return set()

    @staticmethod
    def _kill(pid: int, number: int) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
