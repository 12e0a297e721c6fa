"""How long `launch/status.py` takes on a large generation run, beside reading every sidecar:
python benchmarks/status.py [--shards 100000] [--workers 256]. Nothing is generated: the run folder is made up."""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from generation.plan import Plan
from generation.settings import GenerateConfig
from stablerep.data.shards import shard_name
from stablerep.runtime.config import to_yaml
from stablerep.runtime.rundir import REPO, write_json

QUALITY = {"black": 0.0, "constant": 0.0, "retried": 0.0, "distance": 0.2345}
CAPTIONS, IMAGES, SECONDS = 64, 6, 60.0  # captions a shard, images a caption, seconds a shard


def make_up(run: Path, shards: int, workers: int) -> None:
    """Nine of ten shards committed, by workers that still hold one each, with sidecars of the usual size."""
    for name in ("shards", "events", "leases"):
        (run / name).mkdir(parents=True)
    total = shards * CAPTIONS
    write_json(run / "plan.json", vars(Plan(total, total * IMAGES, shards, IMAGES, CAPTIONS, "", "", {}, 0.0, "")))
    (run / "config.yaml").write_text(to_yaml(GenerateConfig(out=str(run))))
    members = [[f"{c:016x}.{j}.jpg", 512 * j, 12345] for c in range(CAPTIONS) for j in range(IMAGES)]
    sidecar = json.dumps({"size": 0, "members": members})
    done, now = shards * 9 // 10, time.time()
    rounds = -(-done // workers)
    for w in range(workers):
        name = f"generate-0-4242_{w}-r0-{10000 + w}"
        base: dict[str, object] = {"process": name}
        lines = [{"time": now - rounds * SECONDS - 30, "event": "started", **base, "device": "cuda:0", "node": f"node{w}"}]
        for turn, shard in enumerate(range(w, done, workers)):
            begin = now - (rounds - turn) * SECONDS
            lines.append({"time": begin + 59, "event": "committed", **base, "shard": shard, "images": CAPTIONS * IMAGES,
                          "seconds": 58.9, "quality": {**QUALITY, "jpeg_bytes": 9000 + shard % 1000}})  # fmt: skip
            (run / "shards" / f"{shard_name(shard)}.tar").touch()
            (run / "shards" / f"{shard_name(shard)}.json").write_text(sidecar)
        (run / "events" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "leases" / f"{shard_name(done + w)}.lease").write_text(json.dumps({"name": name}))


def children_s() -> float:
    """CPU time of the commands so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Print the times and their ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=100000)
    parser.add_argument("--workers", type=int, default=256)
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        run = Path(folder) / "run"
        make_up(run, words.shards, words.workers)
        times, cpu = [], []
        for _ in range(5):
            begin, used = time.monotonic(), children_s()
            done = subprocess.run([sys.executable, str(REPO / "launch/status.py"), str(run)], capture_output=True, text=True)
            times.append(time.monotonic() - begin)
            cpu.append(children_s() - used)
            assert done.returncode == 3, done.stderr
        print("\n".join(done.stdout.splitlines()[:8]))
        begin = time.monotonic()
        for entry in os.scandir(run / "shards"):
            if entry.name.endswith(".json"):
                json.loads(Path(entry.path).read_text())
        every = time.monotonic() - begin
    print(f"{words.shards} shards, {words.workers} workers: status.py answers in {sorted(times)[2]:.2f} s, "
          f"{sorted(cpu)[2]:.2f} s of CPU (medians of 5; load {os.getloadavg()[0]:.1f});")  # fmt: skip
    print(f"reading every sidecar alone takes {every:.1f} s, {every / sorted(times)[2]:.1f}x")


if __name__ == "__main__":
    main()
