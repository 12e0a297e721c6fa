"""Claimants: processes that claim shards as workers do, and make nothing: python tests/claimants.py RUN NAME..."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from helpers import REPO

from generation.claims import Claims
from generation.lease import Leases, Work
from generation.plan import Plan
from generation.settings import GenerateConfig
from stablerep.data.shards import Sample, write_shard
from stablerep.runtime.events import Events


class CountedLeases(Leases):
    """Leases that count how often one was asked for."""

    looks = 0

    def claim(self, work: Work) -> str | None:
        self.looks += 1
        return super().claim(work)


def planned(shards: int) -> Plan:
    """A plan of shards without captions."""
    return Plan(0, 0, shards, 0, 0, "", "", {}, 0.0, "")


def claims_of(run: Path, shards: int, name: str, node: str = "n1", timeout_s: float = 60.0) -> Claims:
    """The claims of a worker on a run of such shards."""
    leases = CountedLeases(run / "leases", name, timeout_s)
    return Claims(run, planned(shards), GenerateConfig(out=str(run)), leases, Events(run, name), node)


def make(claims: Claims, shard: int) -> None:
    """Commit a shard that was claimed, and give its lease back."""
    write_shard(claims.run / "shards", shard, [Sample("0" * 16, "", [], {})], {})
    claims.leases.release(shard)


def start(run: Path, shards: int, count: int, timeout_s: float) -> list[int]:
    """Start claimants, forks of one process; their pids."""
    env = {**os.environ, "PYTHONPATH": f"{REPO}:{REPO / 'tests'}"}
    words = [sys.executable, __file__, run, shards, count, timeout_s]
    done = subprocess.run([*map(str, words)], env=env, check=True, stdout=subprocess.PIPE, text=True)
    return [*map(int, done.stdout.split())]


def claim_all(run: Path, shards: int, name: str, timeout_s: float) -> None:
    """A claimant's life."""
    claims = claims_of(run, shards, name, timeout_s=timeout_s)
    claims.events.write("started")
    while claims.outcome is None:
        shard = claims.next()
        if shard is None:
            time.sleep(0.1)
            continue
        claims.events.write("making", shard=shard)
        make(claims, shard)
    claims.leases.close()
    claims.events.write("ended", outcome=claims.outcome, looks=claims.leases.looks)


def main() -> None:
    """Fork the claimants, say who they are, and leave them alone."""
    run, shards, count, timeout_s = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    os.fsync = os.fdatasync = lambda _: None  # processes are killed here, not machines
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for _ in range(count):
        pid = os.fork()
        if not pid:
            os.dup2(os.open(run / "claimants.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            os.dup2(2, 1)
            claim_all(run, shards, f"claimant-{os.getpid()}", timeout_s)
            os._exit(0)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
