"""Training on this machine with real ranks: kill and resume, other rank counts, loading elsewhere."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import REPO, command, kill_all, local_pids, wait_for

from stablerep.data.augment import augment, crop, draw
from stablerep.data.order import Order
from stablerep.runtime.rundir import read_jsonl

FAST = ["--config", str(REPO / "configs/train/demo.yaml"), "--global-batch", "16", "--steps", "40", "--log-every", "1"]
FAST += ["--checkpoint-every", "5", "--head-hidden", "32", "--head-out", "16"]


def train(data, run, *more):
    return command("launch/train.py", "--data", data, "--out", run, "--cluster", "local", *FAST, *more)


def losses(run):
    """step -> loss; a step that was done twice (lost with a killed rank) must have the same loss both times."""
    seen = {}
    for record in read_jsonl(run / "metrics.jsonl"):
        assert seen.setdefault(record["step"], record["loss"]) == record["loss"]
    return seen


@pytest.fixture(scope="module")
def unbroken(reference, tmp_path_factory):
    run = tmp_path_factory.mktemp("train") / "unbroken"
    done = train(reference, run, "--nodes", "2")
    assert done.returncode == 0, done.stderr
    return run


def test_sigkill_then_resume_is_bit_for_bit(reference, unbroken, tmp_path):
    run = tmp_path / "run"
    try:
        assert train(reference, run, "--nodes", "2", "--wait", "false").returncode == 0
        wait_for(lambda: (run / "checkpoints/step-00000005/state.json").exists(), 120, "a checkpoint")
        kill_all(run)
        assert not (run / "final").exists()
        assert train(reference, run, "--nodes", "2").returncode == 0
    finally:
        kill_all(run)
    assert losses(run) == losses(unbroken) and len(losses(run)) == 40
    weights = [(r / "final/encoder.safetensors").read_bytes() for r in (run, unbroken)]
    assert weights[0] == weights[1]


def test_signal_saves_and_another_rank_count_goes_on(reference, unbroken, tmp_path):
    run = tmp_path / "run"
    assert train(reference, run, "--nodes", "2", "--wait", "false").returncode == 0
    wait_for(lambda: (run / "metrics.jsonl").exists(), 120, "a step")
    events = [json.loads(p.read_text().splitlines()[0]) for p in (run / "events").glob("train-1*.jsonl")]
    rank = int(events[0]["process"].rsplit("-", 1)[1])
    helpers = [int(p) for t in Path(f"/proc/{rank}/task").iterdir() for p in (t / "children").read_text().split()]
    assert helpers, "a data-loader worker"
    for pid in [*helpers, rank]:  # as Slurm does: every process of one rank hears it, both ranks stop
        os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not local_pids(run), 60, "both ranks to stop")
    assert not (run / "final").exists() and list((run / "checkpoints").iterdir())
    assert train(reference, run, "--nodes", "1").returncode == 0
    seen, whole = losses(run), losses(unbroken)
    assert seen.keys() == whole.keys()
    assert max(abs(seen[s] - whole[s]) for s in whole) < 2e-3


def test_encoder_loads_here_and_in_plain_timm(unbroken):
    import timm
    from safetensors.torch import load_file

    import stablerep

    model = stablerep.load_encoder(str(unbroken))
    config = json.loads((unbroken / "final/config.json").read_text())
    plain = timm.create_model(config["architecture"], num_classes=0, **config["model_args"]).eval()
    plain.load_state_dict(load_file(unbroken / "final/encoder.safetensors"))
    x = torch.randn(2, 3, 32, 32)
    assert model(x).equal(plain(x)) and model(x).shape == (2, 128)


def test_bad_requests_are_one_line(reference, unbroken, tmp_path):
    for more, words in [
        (["--global-batch", "15"], "does not divide"),
        (["--global-batch", "400"], "needs more"),
        (["--images-per-caption", "9"], "holds 2"),
        (["--method", "dinosaur"], "none of"),
        (["--data", str(tmp_path)], "dataset.json"),
    ]:
        done = (
            command(
                "launch/train.py",
                "--data",
                reference,
                "--out",
                tmp_path / "x",
                "--cluster",
                "local",
                *FAST,
                "--nodes",
                "2",
                *more,
            )
            if "--data" not in more
            else command("launch/train.py", "--out", tmp_path / "x", "--cluster", "local", *FAST, *more)
        )
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "x").exists()
    other = train(reference, unbroken, "--nodes", "2", "--seed", "5")
    assert other.returncode == 2 and "seed 0 -> 5" in other.stderr


def test_evaluate_scores_real_pictures(unbroken, tmp_path):
    done = command(
        "launch/evaluate.py", "--checkpoint", unbroken, "--labels", "10", "--resamples", "2", "--random-encoders", "1",
        "--out", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = list(read_jsonl(tmp_path / "results.jsonl"))
    assert [(r["protocol"], r["checkpoint"]) for r in records] == [
        ("linear", str(unbroken)), ("knn", str(unbroken)), ("linear", "random-0"), ("knn", "random-0")
    ]  # fmt: skip
    assert all(25 < r["value"] < 95 for r in records)
    assert command("launch/evaluate.py", "--checkpoint", tmp_path).returncode == 2


def test_order_is_the_same_for_any_rank_count_and_covers_the_data():
    from stablerep.data.loader import rank_rows

    order = Order(seed=3, captions=20, stored=6, unit="caption", views=4, units_per_batch=4)
    for step in (0, 4, 5, 13):
        whole = order.batch(step)
        for world in (1, 2, 4):
            assert [r for rank in range(world) for r in rank_rows(order, step, rank, world)] == whole
        assert len({(r.caption, r.image) for r in whole}) == 16
    assert sorted({r.caption for s in range(5) for r in order.batch(s)}) == list(range(20))
    assert order.batch(0) != order.batch(5)


def test_augmentation_of_a_row_does_not_depend_on_the_rank():
    random = np.random.default_rng(0)
    pictures = torch.stack([crop(random.integers(0, 256, (40, 30, 3), dtype=np.uint8), 32, 0.3, random) for _ in range(8)])
    whole = augment(pictures, draw(0, 5, 8), 0)
    halves = torch.cat([augment(pictures[:4], draw(0, 5, 8), 0), augment(pictures[4:], draw(0, 5, 8), 4)])
    assert torch.allclose(whole, halves, atol=1e-6) and whole.shape == (8, 3, 32, 32)
    assert whole.min() >= -1.01 and whole.max() <= 1.01 and not whole.equal(augment(pictures, draw(0, 6, 8), 0))
