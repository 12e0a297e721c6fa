"""How fast many workers claim many shards, and what it asks of the file system, beside a walk over all shards by every worker:
python benchmarks/claims.py [--shards 100000] [--workers 64] [--baseline-shards 5000] [--folder .]. Real processes, leases,
events and surveys; a stub commits a shard of no image, without fsync. `strace`, where it is installed, counts the system calls
of a smaller run."""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from generation.claims import Claims
from generation.failures import failures, given_up
from generation.lease import Leases, Work
from generation.plan import Plan, write_dataset
from generation.settings import GenerateConfig
from generation.worker import PAUSE_S
from stablerep.data.shards import Sample, encode_shard, read_sidecar, shard_name
from stablerep.runtime.events import Events, read_events
from stablerep.runtime.rundir import REPO, append_jsonl

TAR, SIDECAR = encode_shard([Sample("0" * 16, "", [], {})])
STRACED = (2000, 4)  # shards and workers of the run whose system calls are counted


def commit(run: Path, shard: int) -> None:
    """What a worker commits, as small as it can be: both files by temporary name and rename."""
    for ending, data in (("tar", TAR), ("json", json.dumps(SIDECAR).encode())):
        path = run / "shards" / f"{shard_name(shard)}.{ending}"
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(data)
        os.replace(temporary, path)


class CountedLeases(Leases):
    """Leases that count how often a shard was looked at."""

    looks = 0

    def claim(self, work: Work) -> str | None:
        self.looks += 1
        return super().claim(work)


def ours(run: Path, plan: Plan, config: GenerateConfig, name: str) -> int:
    """Work with `generation.claims`; the look-ups."""
    events, leases = Events(run, name), CountedLeases(run / "leases", name, config.lease_timeout_s)
    claims = Claims(run, plan, config, leases, events, "node")
    while claims.outcome is None:
        shard = claims.next()
        if shard is not None:
            commit(run, shard)
            leases.release(shard)
            events.write("committed", shard=shard, images=0, seconds=0.0)
        elif claims.outcome is None:
            time.sleep(PAUSE_S)
    leases.close()
    return leases.looks


def walk(run: Path, plan: Plan, config: GenerateConfig, name: str) -> int:
    """The baseline, as it was before `generation.claims`: every worker visits every shard, from a place of its own."""
    leases, looks = Leases(run / "leases", name, config.lease_timeout_s), 0

    def event(kind: str, **fields: object) -> None:
        append_jsonl(run / "events" / f"{name}.jsonl", {"time": time.time(), "event": kind, "process": name, **fields})

    def settled(shard: int) -> bool:
        nonlocal looks
        looks += 1
        if read_sidecar(run / "shards", shard) is not None:
            return True
        return given_up(failures(run, shard), config.attempts, "node")

    left = [(zlib.crc32(name.encode()) + k) % plan.shards for k in range(plan.shards)]
    while left:
        busy = False
        for shard in left:
            if (run / "STOP").exists() or settled(shard) or leases.claim(shard) is None:
                continue
            if not settled(shard):
                busy = True
                event("claimed", shard=shard, how="claimed")
                commit(run, shard)
                event("committed", shard=shard, images=0, seconds=0.0)
            json.loads(leases.path(shard).read_text())
            leases.release(shard)
        left = [k for k in left if not settled(k)]
        if left and not busy:
            time.sleep(PAUSE_S)
    if any(read_sidecar(run / "shards", k) is None for k in range(plan.shards)):
        raise AssertionError("a shard is missing")
    if not (run / "dataset.json").exists():
        write_dataset(run, plan, config)
    leases.close()
    return looks


def play(policy: Callable[[Path, Plan, GenerateConfig, str], int], shards: int, workers: int, run: Path) -> float:
    """Let `workers` processes complete a run of stub shards; print what it took, and return claims/s."""
    (run / "shards").mkdir(parents=True)
    plan, config = Plan(shards, 0, shards, 0, 1, "", "", {}, 0.0, ""), GenerateConfig(out=str(run))
    before, start = cpu_s(), time.monotonic()
    pids, (answers, answer) = [], os.pipe()
    for number in range(workers):
        pid = os.fork()
        if not pid:
            os.write(answer, f"{policy(run, plan, config, f'generate-{number}')}\n".encode())
            os._exit(0)
        pids.append(pid)
    assert not any(os.waitpid(pid, 0)[1] for pid in pids), "a worker failed"
    wall = time.monotonic() - start
    os.close(answer)
    with os.fdopen(answers) as file:
        looks = sum(map(int, file))
    events = list(read_events(run))
    made = Counter(e["shard"] for e in events if e["event"] == "committed")
    assert len(made) == shards and (run / "dataset.json").exists()
    surveys = sum(e["event"] == "surveyed" for e in events)
    load = os.getloadavg()[0]
    print(f"{policy.__name__}: {shards} shards, {workers} workers: complete after {wall:.1f} s, {shards / wall:,.0f} claims/s, "
          f"{1e3 * (cpu_s() - before) / shards:.2f} ms of CPU and {looks / shards:.2f} look-ups a claim, "
          f"{made.total() - shards} shards made twice, {surveys} listings; load {load:.1f}", flush=True)  # fmt: skip
    return shards / wall


def cpu_s() -> float:
    """CPU time of the workers so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def count_calls(policy: Callable[[Path, Plan, GenerateConfig, str], int], folder: Path) -> None:
    """Print the system calls a shard on the run folder, by `strace`, without those that write the shards themselves."""
    (shards, workers), run, log = STRACED, folder / f"straced-{policy.__name__}" / "run", folder / "strace.log"
    code = f"import claims, pathlib; claims.play(claims.{policy.__name__}, {shards}, {workers}, pathlib.Path({str(run)!r}))"
    words = ["strace", "-f", "-y", "-qq", "-e", "trace=%file,%desc", "-o", str(log), sys.executable, "-c", code]
    env = {**os.environ, "PYTHONPATH": f"{REPO / 'benchmarks'}:{REPO}"}
    subprocess.run(words, check=True, env=env, stdout=subprocess.DEVNULL)
    by_name, by_handle = Counter[str](), Counter[str]()
    for line in log.read_text(errors="replace").splitlines():
        call = re.match(r"\d+ +(\w+)\(", line)
        if call is None or (".tmp" in line and f"{run}/shards/" in line):
            continue
        for calls, quotes in ((by_name, '""'), (by_handle, "<>")):
            path = re.search(rf"{quotes[0]}{run}/([^{quotes[1]}]*)", line)
            if path is not None:
                calls[f"{call[1]} {re.sub(r'[^/]*(?=[.][^.]*$)', '*', path[1], count=1)}"] += 1
                break
    for what, calls in (("by name", by_name), ("by handle", by_handle)):
        most = ", ".join(f"{count / shards:.2f} {kind}" for kind, count in calls.most_common(8))
        print(f"  {policy.__name__}: {calls.total() / shards:.2f} calls a shard {what}: {most} ...")


def main() -> None:
    """Print the rates, their ratio, and the system calls of a smaller run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=100000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument(
        "--baseline-shards", type=int, default=5000, help="of the comparison with the walk, which grows as its square"
    )
    parser.add_argument("--folder", default=".", help="on the file system that is measured")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=words.folder) as name:
        folder = Path(name).resolve()
        play(ours, words.shards, words.workers, folder / "large" / "run")
        rate = play(ours, words.baseline_shards, words.workers, folder / "ours" / "run")
        print(
            f"{rate / play(walk, words.baseline_shards, words.workers, folder / 'walk' / 'run'):.1f}x the claims/s of the walk"
        )
        if shutil.which("strace"):
            print(f"system calls with {STRACED[0]} shards and {STRACED[1]} workers, beyond the shards' own files:")
            count_calls(ours, folder)
            count_calls(walk, folder)


if __name__ == "__main__":
    main()
