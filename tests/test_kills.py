"""Random kills, rank counts that change: nothing is lost, and the losses say so."""

import os
import random
import time
from pathlib import Path

import pytest
from ranks import Life, losses, prepare, run_to_end

from stablerep.runtime.events import read_events
from stablerep.runtime.rundir import read_json

KILLS = int(os.environ.get("KILLS", "25"))  # `make soak` sets more


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_random_kills_change_no_bit(reference, tmp_path, dtype):
    settings = {"dtype": dtype, "image_size": 16, "steps": 6 * KILLS, "checkpoint_every": 3}
    whole, run, chance = tmp_path / "whole", tmp_path / "run", random.Random(dtype)
    prepare(reference, whole, 2, **settings)
    run_to_end(whole, 2)
    prepare(reference, run, 2, **settings)
    kills = 0
    while kills < KILLS and not (run / "final").exists():
        life, before = Life(run, 2), _lines(run)
        # A third of the lives die before a step, the others at a random moment of the steps, saves included.
        early, end = chance.random() < 0.3, time.monotonic() + 60
        while not early and _lines(run) == before and all(p.is_alive() for p in life.ranks):
            assert time.monotonic() < end, "a step within a minute"
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.6))  # the moment of the kill, not a wait for something
        life.kill()
        kills += 1
    assert kills >= KILLS * 2 // 3, "killed that often before it could end"
    run_to_end(run, 2)
    assert losses(run) == losses(whole) and len(losses(run)) == settings["steps"]
    assert (run / "final/encoder.safetensors").read_bytes() == (whole / "final/encoder.safetensors").read_bytes()


def _lines(run):
    path = Path(run) / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def lives(data, run, worlds, **settings):
    """Train a part of the steps at each of the rank counts: each life but the last is stopped after a third."""
    prepare(data, run, worlds[0], **settings)
    total = read_json(run / "train.json")["steps"]
    for k, world in enumerate(worlds, 1):
        if k == len(worlds):
            run_to_end(run, world)
        else:
            run_to_end(run, world, StopAt(total * k // len(worlds)))


class StopAt:
    """Patch of a rank: the stop signal reaches the last rank when a step is done."""

    def __init__(self, step):
        self.step = step

    def __call__(self, run, rank):
        import signal

        from stablerep.runtime import dist
        from stablerep.runtime.watchdog import Watchdog

        real, run = Watchdog.beat, Path(run)

        def beat(self_):
            real(self_)
            if rank == dist.world() - 1 and _lines(run) >= self.step:
                os.kill(os.getpid(), signal.SIGUSR1)

        Watchdog.beat = beat


def test_other_rank_counts_see_the_same_batches_and_equal_losses_to_rounding(reference, tmp_path):
    settings = {"steps": 15, "optim": _calm()}
    lives(reference, tmp_path / "whole", [4], **settings)
    lives(reference, tmp_path / "run", [4, 2, 4], **settings)
    whole, run = losses(tmp_path / "whole"), losses(tmp_path / "run")
    assert run.keys() == whole.keys()
    assert [r[1] for r in run.values()] == [w[1] for w in whole.values()], "the same images in every batch"
    assert max(abs(run[s][0] - whole[s][0]) for s in whole) < 1e-3
    written = [e["step"] for e in read_events(tmp_path / "run") if e["event"] == "resumed" and e["rank"] == 0]
    assert len(written) == 2 and 0 < written[0] < written[1] < 15


@pytest.mark.parametrize(("method", "dtype"), [("stablerep", "fp32"), ("stablerep_plus", "bf16")])
def test_reproducible_is_bit_equal_at_any_rank_count(reference, tmp_path, method, dtype):
    settings = {"steps": 9, "reproducible": 4, "method": method, "dtype": dtype}
    lives(reference, tmp_path / "one", [1], **settings)
    lives(reference, tmp_path / "many", [4, 1, 2], **settings)
    assert losses(tmp_path / "many") == losses(tmp_path / "one")
    weights = [(tmp_path / r / "final/encoder.safetensors").read_bytes() for r in ("one", "many")]
    assert weights[0] == weights[1]


def _calm():
    from stablerep.train_config import OptimConfig

    return OptimConfig(lr=5e-4, warmup_epochs=1, clip=1.0)
