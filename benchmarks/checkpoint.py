"""How long a save holds the training up, beside DeepSpeed's own `save_checkpoint` of the same engine:
python benchmarks/checkpoint.py [--arch vit_base] [--rounds 5]. One rank; on a GPU where there is one."""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch.distributed import TCPStore

from stablerep import arch, checkpoint
from stablerep.engine import make_engine
from stablerep.methods import method_class
from stablerep.runtime import dist
from stablerep.runtime.events import Events
from stablerep.step import Step
from stablerep.train_config import TrainConfig


def main() -> None:
    """Print the medians and their ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", default="vit_base")
    parser.add_argument("--rounds", type=int, default=5)
    words = parser.parse_args()
    gpus = int(torch.cuda.is_available())
    dist.start(TCPStore("127.0.0.1", 0, 1, is_master=True), 0, 1, local_rank=0, gpus=gpus)
    config = TrainConfig(arch=words.arch, global_batch=2, dtype="bf16", head_hidden=4096)
    method = method_class(config.method)(arch.create(arch.describe(config.arch, config.image_size)), config)
    engine = make_engine(config, method, 2, 1, bool(gpus))
    device = torch.device("cuda" if gpus else "cpu")
    step = Step(engine, 0, 2, 1, False, 0.0)
    folder = Path(tempfile.mkdtemp(dir="."))
    saver = checkpoint.Saver(folder, 0, dist.Control(600), Events(folder, "bench"))
    stall, ours, theirs = [], [], []
    try:
        for n in range(1, words.rounds + 2):  # the first round warms up
            step(n, [torch.randn(2, 3, 224, 224, device=device)], None, torch.tensor([0, 0], device=device))
            begin = time.monotonic()
            stall.append(saver.save(engine, n, {}))
            saver.finish()
            ours.append(time.monotonic() - begin)
            begin = time.monotonic()
            engine.save_checkpoint(str(folder / "deepspeed"), tag="it")
            theirs.append(time.monotonic() - begin)
        size = sum(p.stat().st_size for p in checkpoint.step_folder(folder, n).iterdir()) / 1e9
    finally:
        saver.close()
        shutil.rmtree(folder)
    name = torch.cuda.get_device_name() if gpus else "CPU"
    a, b, c = (statistics.median(x[1:]) for x in (stall, ours, theirs))
    print(f"{words.arch} with its head, {size:.2f} GB of state, {name}, median of {words.rounds}:")
    print(f"  ours: the step that saves stalls {a:.3f} s; on the disk (fsync, renamed) after {b:.2f} s")
    print(f"  DeepSpeed's save_checkpoint, without fsync: the step stalls {c:.2f} s")
    print(f"  stall, DeepSpeed's over ours: {c / a:.1f}x")
    dist.finish()


if __name__ == "__main__":
    main()
