"""The training engine: every key does what it says, on real ranks; and the command on this machine."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import REPO, command, kill_all, local_pids, wait_for
from ranks import Life, losses, prepare, run_to_end

from stablerep import plan
from stablerep.plan import check_ranks, micro_batch
from stablerep.runtime.config import merge
from stablerep.runtime.errors import UsageError
from stablerep.runtime.events import read_events
from stablerep.runtime.rundir import read_json, read_jsonl
from stablerep.train_config import OptimConfig, TrainConfig

CALM = OptimConfig(lr=5e-4, warmup_epochs=1)


@pytest.fixture(scope="module")
def trained(reference, tmp_path_factory):
    """`trained(world, patch, **changes)`: a run to its end in a folder of its own, made once."""
    folder, made = tmp_path_factory.mktemp("train"), {}

    def run_of(world=1, patch=None, **changes):
        name = f"{world}-{changes}"
        if name not in made:
            made[name] = folder / str(len(made))
            prepare(reference, made[name], world, **{"steps": 5, "optim": CALM, **changes})
            run_to_end(made[name], world, patch)
        return made[name]

    return run_of


def records(run):
    return list(read_jsonl(run / "metrics.jsonl"))


def difference(a, b):
    a, b = losses(a), losses(b)
    assert a.keys() == b.keys()
    return max(abs(a[s][0] - b[s][0]) for s in a)


@pytest.mark.parametrize("method", ["stablerep", "simclr", "stablerep_plus"])
@pytest.mark.parametrize("zero_stage", [1, 2])
def test_parts_and_ranks_change_nothing(trained, method, zero_stage):
    """The loss of the whole batch, whatever is encoded at once, on any number of ranks, in both ZeRO stages."""
    whole = trained(1, method=method)
    parts = trained(2, method=method, micro_batch=4, zero_stage=zero_stage)
    assert read_json(parts / "train.json")["ranks"] == 2
    (began,) = {e["micro_batch"] for e in read_events(parts) if e["event"] == "began"}
    assert began == 4 and difference(whole, parts) < 2e-3


def half_on_cpu(run, rank):
    """Patch: DeepSpeed trains fp16 on this CPU, slowly; it asks for it only because it is slow."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True


@pytest.mark.parametrize("micro", [8, 4])
def test_fp16_scales_the_loss_and_finds_its_scale(trained, micro):
    run = trained(2, half_on_cpu, dtype="fp16", image_size=16, micro_batch=micro, steps=12)
    seen = records(run)
    assert seen[0]["loss_scale"] == 65536 and seen[0]["grad_norm"] is None and seen[0]["skipped"] == 1
    applied = [r for r in seen if r["grad_norm"] is not None]
    assert applied and seen[-1]["loss_scale"] < 65536 and seen[-1]["skipped"] == 12 - len(applied)
    state = read_json(run / "checkpoints/step-00000012/state.json")
    assert state["scaler"]["cur_scale"] == seen[-1]["loss_scale"] and state["applied"] == 12 - seen[-1]["skipped"]


def test_bf16_differs_from_fp32_and_follows_it(trained):
    full, half = losses(trained(1, method="stablerep")), losses(trained(1, dtype="bf16"))
    assert 1e-5 < abs(full[1][0] - half[1][0]) < 0.1 * full[1][0] and full[5][0] != half[5][0]


def test_clipping(trained):
    free, clipped = trained(1, method="stablerep"), trained(1, optim=OptimConfig(lr=5e-4, warmup_epochs=1, clip=1e-3))
    assert records(free)[0]["grad_norm"] == pytest.approx(records(clipped)[0]["grad_norm"], rel=1e-3)
    assert difference(free, clipped) > 1e-4


class Counter:
    """Patch: count what `activation_checkpointing` and `compile` do, into RUN/count."""

    def __call__(self, run, rank):
        import timm.models.vision_transformer as vit

        from stablerep import engine

        real, calls, graphs = vit.Block.forward, [], []

        def forward(block, *args, **kwargs):
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                calls.append(1)
                Path(run, "count").write_text(str(len(calls)))
            return real(block, *args, **kwargs)

        def backend(graph, inputs):
            graphs.append(1)
            Path(run, "graphs").write_text(str(len(graphs)))
            return graph.forward

        vit.Block.forward, engine.COMPILER = forward, backend


def test_activation_checkpointing_computes_blocks_again(trained):
    plain, again = trained(1, Counter(), seed=1, steps=2), trained(1, Counter(), seed=1, steps=2, activation_checkpointing=True)
    assert [int((r / "count").read_text()) for r in (plain, again)] == [8, 16]
    assert difference(plain, again) < 1e-5


def test_compile_compiles_the_encoder(trained):
    compiled = trained(1, Counter(), seed=1, steps=2, compile=True)
    assert int((compiled / "graphs").read_text()) >= 1 and not (compiled / "count").exists()
    assert difference(trained(1, Counter(), seed=1, steps=2), compiled) < 1e-4


def test_a_run_of_nonfinite_steps_stops_with_a_reason(reference, tmp_path):
    run = tmp_path / "run"
    prepare(reference, run, 2, steps=60, checkpoint_every=1, optim=OptimConfig(lr=1e30, warmup_epochs=0))
    assert Life(run, 2).wait() == [1, 1]
    last = (run / "log-0.txt").read_text().strip().splitlines()[-1]
    assert "not finite for 20 steps in a row (step 21" in last and "--optim.lr" in last
    assert sorted(p.name for p in (run / "checkpoints").glob("step-*")) == ["step-00000001"], "no broken state was saved"


def test_metrics_have_what_they_promise(trained):
    for record in records(trained(2, method="stablerep_plus", micro_batch=4, zero_stage=1)):
        for key in ("loss", "lr", "epoch", "images_per_s", "seconds", "data_wait_s", "stall_s", "grad_norm", "loss_scale"):
            assert record[key] >= 0, key
        assert record["mfu"] is None and len(record["ids"]) >= 8 and record["logit_scale"] == pytest.approx(1 / 0.07, rel=0.1)
        assert record["image_loss"] + record["text_loss"] == pytest.approx(record["loss"], rel=0.5)


def test_the_text_tower_loads_beside_the_encoder(trained):
    from stablerep.arch import load_encoder
    from stablerep.eval.zeroshot import zeroshot
    from stablerep.text import load_image_text

    run = str(trained(2, method="stablerep_plus", micro_batch=4, zero_stage=1))
    with torch.inference_mode():
        features = load_encoder(run)(torch.randn(8, 3, 32, 32)).numpy()
    tower = load_image_text(run)
    assert tower.logit_scale.item() != np.float32(np.log(1 / 0.07)), "trained, not new"
    score = zeroshot(tower, features, np.arange(8) % 2, ["hat", "bag"], ["a photo of a {}"])
    assert 0 <= score.low <= score.value <= score.high <= 100 and score.n == 8


def test_flops_are_counted():
    from stablerep import arch
    from stablerep.metrics import peak_flops, training_flops

    vit = arch.create(arch.describe("vit_tiny", 224))
    counted = training_flops(lambda views, tokens: vit(views[0]), [torch.zeros(2, 3, 224, 224)], None) / 2
    # 12 blocks of 197 tokens, width 192: 24 s w^2 + 4 s^2 w FLOPs a block; patches: 2 x 196 x 768 x 192.
    blocks = 12 * (24 * 197 * 192**2 + 4 * 197**2 * 192)
    assert counted == pytest.approx(3 * (blocks + 2 * 196 * 768 * 192), rel=0.01)
    assert peak_flops(torch.device("cpu")) == ("CPU", None)


def test_micro_batch_follows_memory_and_ranks_are_checked():
    config = TrainConfig(global_batch=8256, arch="vit_large")
    assert micro_batch(config, 258, 1, 1e9, 300e9) == 258
    assert micro_batch(config, 258, 1, 1e9, 100e9) == 86
    assert micro_batch(config, 258, 6, 1e9, 100e9) == 6 and micro_batch(config, 258, 6, 1e9, 1.0) == 6
    with pytest.raises(UsageError, match=r"into 7 ranks.*nearest are 8253 and 8260.*fits 4 or 6 or 8 or 12 ranks"):
        check_ranks(config, 7, 1)
    with pytest.raises(UsageError, match="whole captions"):
        check_ranks(config, 64, 6)
    with pytest.raises(UsageError, match="power of two"):
        plan.check(TrainConfig(data=["x"], reproducible=6))


@pytest.mark.parametrize("path", sorted((REPO / "configs/train").glob("stablerep*.yaml")), ids=lambda p: p.stem)
def test_recipes_are_the_papers(path):
    config = merge(TrainConfig, [str(path)], {"data": ["x"]})
    plan.check(config)
    check_ranks(config, 32, 6)  # 4 nodes of 8 GPUs, 43 whole captions each
    assert config.global_batch == 32 * 43 * 6
    # The official code: blr x captions x images / 256, and half of it because each image is cropped once.
    assert config.optim.lr * config.global_batch / 256 == pytest.approx(2e-4 * 32 * 43 * 6 / 256 * 1 / 2)
    assert (config.epochs, config.optim.warmup_epochs) == ((13, 0.45) if "redcaps" in path.stem else (15, 0.5))


@pytest.mark.parametrize("path", sorted((REPO / "configs/train").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_loads(path):
    config = merge(TrainConfig, [str(path)], {"data": ["x"]})
    plan.check(config)
    check_ranks(config, 16, config.images_per_caption or 1)
    named = path.stem.split("_cc12m")[0].split("_redcaps")[0]
    small = named in ("demo", "toy")
    assert small or (named == config.method and (config.epochs or 0) >= 13)


FAST = ["--config", str(REPO / "configs/train/demo.yaml"), "--global-batch", "16", "--steps", "40", "--log-every", "1"]
FAST += ["--checkpoint-every", "5", "--head-hidden", "32", "--head-out", "16"]


def train(data, run, *more):
    return command("launch/train.py", "--data", data, "--out", run, "--cluster", "local", *FAST, *more)


@pytest.fixture(scope="module")
def unbroken(reference, tmp_path_factory):
    run = tmp_path_factory.mktemp("command") / "unbroken"
    done = train(reference, run, "--nodes", "2")
    assert done.returncode == 0, done.stderr
    return run


def test_signal_saves_and_another_rank_count_goes_on(reference, unbroken, tmp_path):
    run = tmp_path / "run"
    try:
        assert train(reference, run, "--nodes", "2", "--wait", "false").returncode == 0
        wait_for(lambda: (run / "metrics.jsonl").exists(), 120, "a step")
        first = next(e for e in read_events(run) if e["event"] == "started" and e["rank"] == 1)
        rank = int(first["process"].rsplit("-", 1)[1])
        helpers = [int(p) for t in Path(f"/proc/{rank}/task").iterdir() for p in (t / "children").read_text().split()]
        assert helpers, "a data-loader worker"
        for pid in [*helpers, rank]:  # as Slurm does: every process of one rank hears it, both ranks stop
            os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not local_pids(run), 60, "both ranks to stop")
        assert not (run / "final").exists() and list((run / "checkpoints").iterdir())
        assert train(reference, run, "--nodes", "1").returncode == 0
    finally:
        kill_all(run)
    seen, whole = losses(run), losses(unbroken)
    assert seen.keys() == whole.keys()
    assert max(abs(seen[s][0] - whole[s][0]) for s in whole) < 2e-3


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


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--global-batch", "15"], "14 and 16"),
        (["--nodes", "3"], "does not divide into 3 ranks"),
        (["--global-batch", "400"], "needs more"),
        (["--images-per-caption", "9", "--global-batch", "18"], "9 are asked for"),
        (["--method", "dinosaur"], "none of"),
        (["--zero-stage", "3"], "none of"),
        (["--micro-batch", "3"], "does not divide"),
        (["--wandb", "x", "--dtype", "fp8"], "none of"),
    ],
)
def test_bad_requests_are_one_line(reference, tmp_path, more, words):
    done = train(reference, tmp_path / "x", "--nodes", "2", *more)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "x").exists()


def test_other_data_and_settings_are_one_line(reference, unbroken, tmp_path):
    nothing = command("launch/train.py", "--data", tmp_path, "--out", tmp_path / "x", "--cluster", "local", *FAST)
    assert nothing.returncode == 2 and nothing.stderr.count("\n") == 1 and not (tmp_path / "x").exists()
    other = train(reference, unbroken, "--nodes", "2", "--seed", "5")
    assert other.returncode == 2 and "seed 0 -> 5" in other.stderr


def test_evaluate_scores_real_pictures(reference, unbroken, tmp_path):
    done = command(
        "launch/evaluate.py", "--checkpoint", unbroken, "--dataset", "fashion-probe", "--labels", "10", "--resamples", "2",
        "--random-encoders", "1", "--cluster", "local", "--out", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = list(read_jsonl(tmp_path / "results.jsonl"))
    assert [(r["protocol"], r["checkpoint"]) for r in found] == [
        ("linear", str(unbroken)), ("knn", str(unbroken)), ("linear", "random-0"), ("knn", "random-0")
    ]  # fmt: skip
    assert all(25 < r["value"] < 95 for r in found)
    first, reference_plan = found[0], read_json(reference / "plan.json")
    assert first["run"] == str(unbroken) and first["method"] == "stablerep" and first["step"] > 0
    (data,) = first["data"]
    assert data["plan_sha256"] == reference_plan["hash"] and data["n_captions"] == reference_plan["captions"]
    assert data["kind"] == "generated" and data["captions"] and found[2]["data"] == []
    assert command("launch/evaluate.py", "--checkpoint", tmp_path, "--cluster", "local").returncode == 2
