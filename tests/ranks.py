"""Training with real ranks, started fast: a fork server imports torch, timm and DeepSpeed once, every rank is a fork of it."""

import json
import multiprocessing
import os
import time
from multiprocessing import forkserver
from pathlib import Path

# What the fork server loads once, beside what this file needs itself.
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import timm  # noqa: F401
import torch._inductor.compile_fx
import torch.utils.flop_counter
import torch.utils.tensorboard  # noqa: F401
from helpers import REPO

import stablerep.train
from stablerep.plan import freeze
from stablerep.runtime import dist
from stablerep.runtime.events import Events
from stablerep.runtime.rundir import read_jsonl, write_json
from stablerep.runtime.stop import StopFlag
from stablerep.runtime.watchdog import Watchdog
from stablerep.train_config import DINOConfig, MAEConfig, OptimConfig, TextConfig, TrainConfig

SMALL = {
    "arch": "vit_micro", "image_size": 32, "global_batch": 16, "steps": 12, "dtype": "fp32", "head_hidden": 32, "head_out": 16,
    "crop_min": 0.3, "workers": 0, "log_every": 1, "checkpoint_every": 4,
}  # fmt: skip


def small_config(data, run, **changes):
    """A config that trains in seconds."""
    text = TextConfig(width=32, layers=1, heads=2, context=16, embed=16)
    mae = MAEConfig(decoder_width=32, decoder_depth=1, decoder_heads=2)
    dino = changes.pop("dino", DINOConfig(prototypes=48, local_crops=2, local_size=8, freeze_epochs=2))
    optim = changes.pop("optim", OptimConfig(lr=5e-3, warmup_epochs=1, clip=1.0))
    parts = {"text": text, "mae": mae, "dino": dino, "optim": optim}
    return TrainConfig(**{**SMALL, "data": [str(data)], "out": str(run), **parts, **changes})


def prepare(data, run, ranks, **changes):
    """What launch/train.py writes before it submits."""
    freeze(small_config(data, run, **changes), Path(run), ranks, report=lambda line: None)


def rank_main(run, rank, world, place, life, patch):
    """One rank of one life."""
    from torch.distributed import TCPStore

    os.dup2(os.open(f"{run}/log-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    if rank == 0:
        store = TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)
        write_json(place, {"port": store.port})
    else:
        while not place.exists():
            time.sleep(0.01)
        store = TCPStore("127.0.0.1", json.loads(place.read_text())["port"], world, is_master=False)
    dist.start(store, rank, world, local_rank=rank, gpus=0, timeout_s=120)
    if patch is not None:
        patch(run, rank)
    run = Path(run)
    stop = StopFlag().install()
    events = Events(run, f"train-{rank}-{os.getpid()}", life=life, rank=rank)
    stablerep.train.train(run, stop, events, Watchdog(run / f"words-{rank}", events, 600), life)
    dist.finish()
    dist.skip_destructors()


def _start_server(context):
    """Start the fork server, with a path on which it finds this file."""
    context.set_forkserver_preload(["ranks"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (REPO, REPO / "tests")))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


class Life:
    """One life of a training job: `world` processes."""

    count = 0

    def __init__(self, run, world, patch=None):
        context = multiprocessing.get_context("forkserver")
        _start_server(context)
        Life.count += 1
        place = Path(run) / f"meet-{Life.count}-{os.getpid()}.json"
        words = [(str(run), rank, world, place, f"test-{Life.count}", patch) for rank in range(world)]
        self.ranks = [context.Process(target=rank_main, args=w, daemon=True) for w in words]
        for process in self.ranks:
            process.start()

    def wait(self, seconds=300):
        """Exit codes of the ranks."""
        end = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.1, end - time.monotonic()))
        return [process.exitcode for process in self.ranks]

    def kill(self):
        """SIGKILL every rank at once."""
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.join()


def run_to_end(run, world, patch=None):
    """Train (or go on) to the end; the log of a rank that failed is shown."""
    codes = Life(run, world, patch).wait()
    assert codes == [0] * world, "\n".join(p.read_text()[-3000:] for p in Path(run).glob("log-*.txt"))


def losses(run):
    """step -> (loss, digest of the batch's ids); a step that was done twice must have come out the same both times."""
    seen = {}
    for record in read_jsonl(Path(run) / "metrics.jsonl"):
        pair = (record["loss"], record["ids"])
        assert seen.setdefault(record["step"], pair) == pair, f"step {record['step']} came out differently"
    return seen
