"""EMA teachers: their averages, schedules and what they see; equal gradients on any number of ranks; exact resume."""

import math

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from ranks import losses, prepare, run_to_end, small_config
from test_kills import StopAt
from test_methods import build, inputs

from stablerep import arch
from stablerep.collapse import collapse
from stablerep.methods import method_class
from stablerep.methods.dino import DINO
from stablerep.methods.teacher import momentum
from stablerep.metrics import training_flops
from stablerep.optim import weight_decay
from stablerep.plan import check
from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import read_jsonl
from stablerep.train_config import DINOConfig, OptimConfig, TrainConfig

TAUGHT = ["byol", "mocov3", "dino"]


# --- averages


def test_momentum_is_the_papers():
    for step in (0, 1, 37, 100):
        assert momentum(0.996, step, 100) == pytest.approx(1 - 0.004 * (math.cos(math.pi * step / 100) + 1) / 2)
    assert momentum(0.99, 0, 7) == pytest.approx(0.99) and momentum(0.99, 7, 7) == 1
    assert [method_class(name).default_momentum for name in TAUGHT] == [0.996, 0.99, 0.996]


@pytest.mark.parametrize("name", TAUGHT)
def test_averages_follow_the_student_and_the_teacher_the_averages(name):
    method, _ = build(name, momentum=0.9)
    expected = {n: p.detach().double().clone() for n, p in method.named_parameters() if f"teacher.{n}" in method.averages}
    assert expected and all(n.split(".")[0] in ("encoder", "head") for n in expected)
    g = torch.Generator().manual_seed(3)
    for step in range(1, 6):
        with torch.no_grad():
            for p in method.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn(p.shape, generator=g))
        if name == "dino":
            method.batch_centre = torch.zeros(48)
        method.after_step(step, 20)
        for n, p in method.named_parameters():
            if n in expected:
                expected[n] += (1 - momentum(0.9, step, 20)) * (p.detach().double() - expected[n])
    method.bfloat16().before_step(5, 20, epoch=1.0)
    weights = dict(method.named_parameters())
    for n, value in expected.items():
        assert torch.allclose(method.averages[f"teacher.{n}"].double(), value, atol=1e-6)
        assert weights[f"teacher.{n}"].equal(method.averages[f"teacher.{n}"].bfloat16()) and not weights[n].equal(
            weights[f"teacher.{n}"]
        )


def test_an_average_of_bf16_weights_loses_no_small_update():
    """A float32 master that goes up by a thousandth of a bf16 step: the average is as near as one bf16 step to the master's
    own average, where an average that is itself bf16 would stand still."""
    method, _ = build("byol", momentum=0.99)
    method.bfloat16()
    weight, average = method.encoder.cls_token, method.averages["teacher.encoder.cls_token"]
    average.fill_(1.0)
    master, exact, half = 1.0, 1.0, torch.ones((), dtype=torch.bfloat16)
    for _ in range(3000):
        master += 2.0**-7 / 1000
        weight.data.fill_(master)
        average.lerp_(weight.float(), 0.01)
        exact += 0.01 * (master - exact)
        half += 0.01 * (weight.flatten()[0] - half)
    assert master > 1.02 and half == 1 and (average - exact).abs().max() < 2.0**-8


@pytest.mark.parametrize("name", TAUGHT)
def test_gradient_goes_through_the_student_only(name):
    method, config = build(name)
    views, _, ids = inputs(method, config)
    encoded = {k: v.detach().requires_grad_() for k, v in method(views, None).items()}
    loss, parts = method.loss(encoded, ids)
    loss.backward()
    assert all((encoded[k].grad is None) == k.startswith("target") for k in encoded)
    assert all(p.grad is None for p in method.teacher.parameters())
    assert set(parts) == (set() if name == "mocov3" else {"feature_std", "effective_rank"})
    method.log_every = 10
    method.before_step(0, 100, 0.0)
    assert method.loss(encoded, ids)[1] == {}, "measured where it is logged"


def test_a_teacher_goes_forward_only():
    counted = {}
    for name in ("simclr", "byol"):
        method, config = build(name)
        views = inputs(method, config)[0]
        counted[name] = training_flops(method, views, None)
    assert counted["byol"] == pytest.approx((3 + 1) / 3 * counted["simclr"])  # two views of each


# --- what is theirs alone


def test_asymmetric_views():
    config = small_config("-", "-", method="dino", crop_min=0.05, dino=DINOConfig(local_crops=3, local_size=8, split=0.5))
    for name in TAUGHT:
        first, second = method_class(name).views(config)[:2]
        assert (first.blur_p, first.solarize_p, second.blur_p, second.solarize_p) == (1.0, 0.0, 0.1, 0.2)
    crops = [(v.size, v.crop_min, v.crop_max, v.solarize_p) for v in DINO.views(config)]
    assert crops == [(32, 0.5, 1.0, 0.0), (32, 0.5, 1.0, 0.2)] + [(8, 0.05, 0.5, 0.0)] * 3


def test_positions_are_the_official_codes():
    """MoCo v3's build_2d_sincos_position_embedding, in NumPy."""
    height, width, dim = 3, 5, 16
    omega = 1.0 / 10000 ** (np.arange(dim // 4) / (dim // 4))
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    of_x, of_y = np.outer(x.flatten(), omega), np.outer(y.flatten(), omega)
    want = np.concatenate([np.sin(of_x), np.cos(of_x), np.sin(of_y), np.cos(of_y)], 1)
    ours = arch.sincos_positions(height, width, dim).numpy()
    assert (ours[0] == 0).all() and np.allclose(ours[1:], want, atol=1e-6)


def test_mocov3_trains_neither_patches_nor_positions():
    method, config = build("mocov3")
    encoder = method.encoder
    assert encoder.pos_embed[0].equal(arch.sincos_positions(4, 4, 128))
    bound = (6 / (3 * 4 * 4 + 128)) ** 0.5
    assert 0.9 * bound < encoder.patch_embed.proj.weight.max() < bound
    frozen = [n for n, p in encoder.named_parameters() if not p.requires_grad]
    assert frozen == ["pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    assert method.temperature == 0.2 and build("mocov3", temperature=0.3)[0].temperature == 0.3
    with pytest.raises(UsageError, match="CLS token"):
        method_class("mocov3")(arch.create({**arch.describe("vit_micro", 16), "model_args": {
            **arch.describe("vit_micro", 16)["model_args"], "class_token": False, "global_pool": "avg"}}), config)  # fmt: skip


def test_other_sizes_are_timms():
    import timm

    described = arch.describe("vit_micro", 16)
    torch.manual_seed(0)
    encoder = arch.create(described)
    theirs = timm.create_model(described["architecture"], num_classes=0, dynamic_img_size=True, **described["model_args"])
    theirs.load_state_dict(encoder.state_dict())
    x = torch.randn(2, 3, 16, 16)
    before = encoder(x)
    arch.accept_other_sizes(encoder)
    assert encoder(x).equal(before) and encoder(x[..., :8, :12]).equal(theirs(x[..., :8, :12]))
    assert arch.patch_size("vit_large", 224) == 16 and arch.patch_size("vit_micro", 32) == 8
    assert arch.patch_size("vit_huge_patch14_224", 224) == 14


def test_dino_schedules_centre_and_frozen_prototypes():
    keys = DINOConfig(prototypes=48, local_crops=2, local_size=8, warmup_epochs=10, freeze_epochs=1)
    method, config = build("dino", dino=keys)
    views, _, ids = inputs(method, config)
    for epoch, temperature in ((0, 0.04), (5, 0.055), (10, 0.07), (80, 0.07)):
        method.before_step(0, 10, epoch)
        assert method.teacher_temperature == pytest.approx(temperature)
    weight = method.head.prototypes.weight
    for epoch, moves in ((0.99, False), (1.0, True)):
        weight.grad = None
        method.before_step(0, 10, epoch)
        method.loss(method(views, None), ids)[0].backward()
        assert (weight.grad is not None) == moves
    encoded = method(views, None)
    outputs = torch.cat([method.teacher["head"](encoded[f"target{v}"]) for v in (0, 1)])
    before = method.averages["centre"].uniform_().clone()
    method.loss(encoded, ids)
    method.after_step(1, 10)
    assert torch.allclose(method.averages["centre"], 0.9 * before + 0.1 * outputs.mean(0), atol=1e-6)
    assert outputs.abs().max() <= 1 + 1e-6, "cosines"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dino": DINOConfig(local_size=90)}, "not a multiple of the 16 pixels"),
        ({"crop_min": 0.5}, r"--dino\.split 0\.4 is not between"),
        ({"dino": DINOConfig(prototypes=0)}, r"--dino\.prototypes"),
        ({"momentum": 1.5}, "momentum 1.5"),
    ],
)
def test_bad_keys_are_one_line(changes, words):
    with pytest.raises(UsageError, match=words):
        check(TrainConfig(data=["x"], method="dino", **changes))
    check(TrainConfig(data=["x"], method="dino"))


def test_weight_decay_schedule():
    assert weight_decay(0, 10, 0.04, 0.4) == pytest.approx(0.04) and weight_decay(5, 10, 0.04, 0.4) == pytest.approx(0.22)
    assert weight_decay(10, 10, 0.04, 0.4) == pytest.approx(0.4) and weight_decay(7, 10, 0.1, None) == 0.1


# --- collapse


def test_collapse_is_seen():
    g = torch.Generator().manual_seed(0)
    healthy, one = torch.randn(512, 64, generator=g), torch.randn(1, 64, generator=g)
    measured = collapse(healthy)
    values = np.linalg.svd((healthy / healthy.norm(dim=1, keepdim=True)).double().numpy(), compute_uv=False)
    share = values / values.sum()
    assert measured["effective_rank"].item() == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)
    assert 0.9 < measured["feature_std"] < 1.1 and measured["effective_rank"] > 50
    for scale in (0.0, 1e-4):
        dead = collapse(one + scale * torch.randn(512, 64, generator=g))
        assert dead["feature_std"] < 1e-3 and dead["effective_rank"] < 1.02
    plane = collapse(torch.randn(512, 2, generator=g) @ torch.randn(2, 64, generator=g))  # dimensional collapse
    assert plane["effective_rank"] < 2.01 and plane["feature_std"] > 0.5


# --- ranks


def gradients(rank, world, folder, out):
    """Gradients, measures and averages of a step of each method, over gloo."""
    import torch.distributed as td

    from stablerep.runtime import dist

    torch.set_num_threads(1)
    if world > 1:
        td.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    found = {}
    for name in TAUGHT:
        method, config = build(name)
        method.double()
        views, _, ids = inputs(method, config, captions=12)
        own = slice(rank * 12 // world, (rank + 1) * 12 // world)
        method.before_step(0, 10, epoch=3.0)
        loss, parts = method.loss(method([v[own].double() for v in views], None), ids[own])
        loss.backward()
        method.after_step(1, 10)
        grads = torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])
        value = loss.detach().clone()
        if world > 1:  # what DDP and DeepSpeed do
            td.all_reduce(grads)
            td.all_reduce(value)
        centre = method.averages.get("centre", torch.zeros(1))
        found[name] = (value / world, grads / world, *parts.values(), centre)
    if rank == 0:
        torch.save(found, out)
    if world > 1:
        dist.finish()
        dist.skip_destructors()


def test_gradients_are_equal_on_one_rank_and_two(tmp_path):
    gradients(0, 1, tmp_path, tmp_path / "one")
    mp.spawn(gradients, (2, str(tmp_path), str(tmp_path / "two")), nprocs=2)
    one, two = torch.load(tmp_path / "one"), torch.load(tmp_path / "two")
    for name in TAUGHT:
        for a, b in zip(one[name], two[name], strict=True):
            assert (a - b).abs().max() <= 1e-5 * a.abs().max(), name
        assert one[name][1].abs().max() > 1e-3


CALM = OptimConfig(lr=5e-4, warmup_epochs=1, weight_decay=0.04, weight_decay_end=0.4)


@pytest.mark.parametrize("name", TAUGHT)
def test_parts_ranks_and_zero_stages_change_nothing(reference, tmp_path, name):
    settings = {"method": name, "image_size": 16, "steps": 6, "optim": CALM, "momentum": 0.9, "log_every": 2}
    prepare(reference, tmp_path / "whole", 1, **settings)
    prepare(reference, tmp_path / "parts", 2, micro_batch=4, zero_stage=2, **settings)
    run_to_end(tmp_path / "whole", 1)
    run_to_end(tmp_path / "parts", 2)
    for a, b in zip(*(read_jsonl(tmp_path / run / "metrics.jsonl") for run in ("whole", "parts")), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-3)
        if name != "mocov3":
            assert a["effective_rank"] == pytest.approx(b["effective_rank"], rel=1e-2) and a["effective_rank"] > 1
    from stablerep import load_encoder

    assert load_encoder(str(tmp_path / "parts"))(torch.zeros(1, 3, 16, 16)).shape == (1, 128)


def test_reproducible_on_one_rank_and_two(reference, tmp_path):
    for world in (1, 2):
        prepare(reference, tmp_path / f"{world}", world, method="dino", image_size=16, steps=4, reproducible=2, momentum=0.9)
        run_to_end(tmp_path / f"{world}", world)
    assert losses(tmp_path / "1") == losses(tmp_path / "2") and len(losses(tmp_path / "1")) == 4
    one, two = averages_of(tmp_path)
    assert one.keys() == two.keys() and all(one[k].equal(two[k]) for k in one)


def averages_of(folder):
    """The averages of both runs' last checkpoints."""
    from safetensors.torch import load_file

    for world in (1, 2):
        (part,) = (folder / f"{world}" / "checkpoints/step-00000004").glob("part-00000-*")
        yield {k: v for k, v in load_file(part).items() if k.startswith("average/")}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resume_with_a_teacher_is_exact(reference, tmp_path, dtype):
    for name in ("whole", "run"):
        prepare(reference, tmp_path / name, 2, method="byol", image_size=16, steps=8, momentum=0.7, dtype=dtype)
    run_to_end(tmp_path / "whole", 2)
    run_to_end(tmp_path / "run", 2, StopAt(3))
    run_to_end(tmp_path / "run", 2)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole") and len(losses(tmp_path / "run")) == 8
