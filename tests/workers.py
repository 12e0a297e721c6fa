"""Generation in tests: planned here, worked by real processes that start in a moment (forks of one that has imported torch
and diffusers), or done by the command itself."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from helpers import REPO, SMALL, command, wait_for

from generation.plan import make_plan
from generation.settings import GenerateConfig, resolve
from stablerep.runtime.rundir import read_json


class Nursery:
    """Starts workers on runs of this machine, and kills what is left of them in the end."""

    def __init__(self) -> None:
        env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        words = [sys.executable, __file__]
        self.server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.pids: list[int] = []

    def start(self, run: Path, count: int, ahead_s: float = 0.0) -> list[int]:
        """Fork `count` workers on a planned run, with a clock that is so much ahead; their pids."""
        pids = []
        for _ in range(count):
            self.server.stdin.write(json.dumps([str(run), ahead_s]) + "\n")
            self.server.stdin.flush()
            pids.append(int(self.server.stdout.readline()))
        self.pids += pids
        return pids

    def kill(self, pids: list[int]) -> None:
        """SIGKILL workers, and wait until they are gone."""
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not any(map(alive, pids)), 60, "workers to die")

    def close(self) -> None:
        """Kill every worker, end the server."""
        self.kill(self.pids)
        self.server.stdin.close()
        self.server.wait(60)


def alive(pid: int) -> bool:
    """Whether a worker still runs."""
    return Path(f"/proc/{pid}").exists()


def generate_line(captions, run, *more):
    """The words of a small `launch/generate.py`."""
    return ["launch/generate.py", "--captions", captions, "--out", run, "--cluster", "local", *SMALL, *more]


def generate(captions, run, *more):
    """Run it."""
    return command(*generate_line(captions, run, *more))


def plan(run, captions, **changes):
    """Plan a run in this process, small."""
    small = {"images_per_caption": 2, "captions_per_shard": 3, "batch_size": 4, "steps": 3}
    config = GenerateConfig(captions=[str(captions)], out=str(run), **{**small, **changes})
    make_plan(resolve(config, 0), write=True)


def committed(run):
    """How many shards are committed."""
    return len(list((run / "shards").glob("*.json")))


def holders(run):
    """Who holds which shard, by the leases."""
    found = {}
    for path in (run / "leases").glob("*.lease"):
        try:
            found[int(path.stem)] = read_json(path)["name"]
        except (OSError, ValueError):  # released, or just being written
            continue
    return found


def complete(run, pids):
    """Wait for workers to end; what they printed, in case the run is not complete then."""
    wait_for(lambda: not any(map(alive, pids)), 300, "workers to end")
    assert (run / "dataset.json").exists(), (run / "workers.log").read_text()


def serve() -> None:
    """Fork a worker for every line that names a run; the kernel reaps them."""
    import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion  # noqa: F401

    import generation.worker  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        run, ahead_s = json.loads(line)
        pid = os.fork()
        if not pid:
            be_worker(Path(run), ahead_s)
            os._exit(0)
        print(pid, flush=True)


def be_worker(run: Path, ahead_s: float) -> None:
    """Work in this process, whose own clock is ahead; the file system keeps the machine's."""
    from generation.worker import work
    from stablerep.runtime.stop import StopFlag

    log = os.open(run / "workers.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    real = time.time
    time.time = lambda: real() + ahead_s
    try:
        work(run, device="cpu", stop=StopFlag().install(), name=f"worker-{os.getpid()}")
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    serve()
