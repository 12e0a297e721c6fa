"""MAE against the paper told by hand, and through the training loop: masks, ranks, memory, resume, final weights."""

import numpy as np
import pytest
import torch
from lightly.models.utils import get_2d_sine_cosine_positional_embedding as lightly_positions
from lightly.models.utils import patchify as lightly_patchify
from ranks import losses, prepare, run_to_end, small_config

from stablerep import arch
from stablerep.data.chance import orders
from stablerep.data.index import build_index, open_index
from stablerep.data.loader import batches, blank
from stablerep.data.order import Order
from stablerep.losses import mae_loss
from stablerep.methods.mae import MAE, normalised, patchify
from stablerep.metrics import training_flops
from stablerep.plan import activation_bytes, check
from stablerep.runtime.errors import UsageError
from stablerep.train_config import MAEConfig, OptimConfig, TrainConfig


def build(size=32, **changes):
    torch.manual_seed(0)
    config = small_config("-", "-", method="mae", image_size=size, **changes)
    description = arch.describe("vit_micro", size)
    description["model_args"]["patch_size"] = 4
    return MAE(arch.create(description), config), config


def inputs(rows=6, size=32):
    images = torch.rand(rows, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return [images, torch.from_numpy(orders(7, np.arange(rows), (size // 4) ** 2))]


def oracle(prediction, target, mask):
    """The paper's code: mean squared error a patch, mean over the masked ones of the batch. With the gradient."""
    error = ((prediction - target) ** 2).mean(-1)
    gradient = 2 * (prediction - target) / target.shape[-1] * mask[:, :, None] / mask.sum()
    return (error * mask).sum() / mask.sum(), gradient


@pytest.mark.parametrize("masked", [[6, 6, 6, 6], [1, 9, 4, 2]])
def test_loss_and_gradient_against_numpy(masked):
    rng = np.random.default_rng(0)
    prediction, target = rng.normal(size=(2, 4, 9, 12))
    mask = np.stack([rng.permutation(9) < m for m in masked]).astype(float)
    x = torch.tensor(prediction, dtype=torch.float32, requires_grad=True)
    ours = mae_loss(x, torch.tensor(target), torch.tensor(mask))
    ours.backward()
    value, gradient = oracle(prediction, target, mask)
    assert ours.item() == pytest.approx(value, rel=1e-6) and np.allclose(x.grad, gradient, atol=1e-7)
    rows = mae_loss(x, torch.tensor(target), torch.tensor(mask), per_row=True)
    assert rows.shape == (4,) and (rows.detach().numpy() @ masked) / sum(masked) == pytest.approx(value, rel=1e-6)


def test_patches_and_positions_are_lightlys():
    images = torch.randn(3, 3, 24, 24)
    assert patchify(images, 8).equal(lightly_patchify(images, 8))
    expected = lightly_positions(embed_dim=64, grid_size=5, cls_token=True)
    assert np.abs(arch.sincos_positions(5, 5, 64).numpy() - expected).max() < 1e-5


def test_normalised_pixels():
    patches = torch.rand(2, 5, 48)
    x = patches.double().numpy()
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, ddof=1, keepdims=True) + 1e-6)
    assert np.abs(normalised(patches).numpy() - expected).max() < 1e-4
    assert normalised(torch.full((1, 1, 48), 0.3)).abs().max() < 1e-3, "a flat patch is no noise"


def by_hand(method, image, order):
    """Error of one row, as the paper tells it: no gather, no scatter, one token after another."""
    vit = method.encoder
    embedded = vit.patch_embed(image[None])[0]
    seen = order[: len(order) // 4].tolist()
    tokens = [vit.cls_token[0, 0] + vit.pos_embed[0, 0]] + [embedded[i] + vit.pos_embed[0, 1 + i] for i in seen]
    latent = method.into(vit.norm(vit.blocks(torch.stack(tokens)[None])))[0]
    canvas = [latent[1 + seen.index(i)] if i in seen else method.mask_token[0, 0] for i in range(len(order))]
    full = torch.stack([latent[0], *canvas])
    full = full + torch.from_numpy(lightly_positions(embed_dim=32, grid_size=8)).float()
    painted = method.out(method.norm(method.decoder(full[None])[0, 1:]))
    target = normalised(lightly_patchify(image[None], 4)[0])
    hidden = [i for i in range(len(order)) if i not in seen]
    return (painted - target)[hidden].square().mean()


def test_forward_against_the_paper_by_hand():
    method, _ = build()
    views = inputs()
    encoded = method(views, None)
    expected = torch.stack([by_hand(method, image, order) for image, order in zip(*views, strict=True)])
    assert torch.allclose(encoded["error"], expected, atol=1e-5)
    loss, _ = method.loss(encoded, torch.arange(6))
    ours = torch.autograd.grad(loss, method.encoder.blocks[0].attn.qkv.weight, retain_graph=True)[0]
    theirs = torch.autograd.grad(expected.mean(), method.encoder.blocks[0].attn.qkv.weight)[0]
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max() and theirs.abs().max() > 1e-4


def test_the_encoder_sees_a_quarter_and_nothing_else():
    method, _ = build()
    (images, order), size = inputs(2), 32
    seen = order[:, :16]
    shown = torch.zeros(2, 64).scatter(1, seen, 1.0).view(2, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    with method.keep.only(seen):
        hidden_changed = method.encoder(images * shown)
        assert hidden_changed.equal(method.encoder(images)) and hidden_changed.shape == (2, 17, 128)
        assert not hidden_changed.equal(method.encoder(images * 0.5))
    assert method.encoder(images).shape == (2, 1 + (size // 4) ** 2, 128), "all patches where nothing is masked"


def test_orders_are_random_and_each_row_has_its_own():
    drawn = orders(3, np.arange(4000), 16)
    assert (np.sort(drawn, axis=1) == np.arange(16)).all()
    assert np.abs(drawn.mean(0) - 7.5).max() < 0.4, "each place is anywhere"
    pairs = np.bincount(drawn[:, 0] * 16 + drawn[:, 1], minlength=256).reshape(16, 16)
    off = pairs[~np.eye(16, dtype=bool)]
    assert ((off - 4000 / 240) ** 2 / (4000 / 240)).sum() < 340, "chi-squared of 239 degrees, p 1e-5"
    assert orders(3, np.arange(2000, 2003), 16).tolist() == drawn[2000:2003].tolist() != orders(4, np.arange(3), 16).tolist()


def test_masks_know_no_rank(reference, tmp_path):
    build_index([str(reference)], tmp_path / "index", print)
    index = open_index(tmp_path / "index")

    def stream(rank, world, first=0):
        return list(
            batches(
                index, Order(0, index, "image", 1, 8), [MAE.views(small_config("-", "-"))[0]], seed=1, first=first, last=3,
                rank=rank, world=world, workers=1, device=torch.device("cpu"), max_broken=0.1, on_broken=print, shuffles=[64],
            )
        )  # fmt: skip

    whole, parts, late = stream(0, 1), [stream(r, 4) for r in range(4)], stream(0, 1, first=2)
    for step, batch in enumerate(whole):
        masks = batch.views[1]
        assert masks.shape == (8, 64) and masks.dtype == torch.int64 and len({tuple(row) for row in masks.tolist()}) == 8
        for v in range(2):
            assert torch.cat([p[step].views[v] for p in parts]).equal(batch.views[v])
    assert late[0].views[1].equal(whole[2].views[1]) and not whole[0].views[1].equal(whole[1].views[1])


CALM = OptimConfig(lr=5e-4, warmup_epochs=1)


@pytest.mark.parametrize("reproducible", [0, 4])
def test_parts_and_ranks_change_nothing(reference, tmp_path, reproducible):
    seen = []
    for world, micro in ((1, None), (2, None if reproducible else 4)):
        run = tmp_path / str(world)
        prepare(reference, run, world, method="mae", steps=4, micro_batch=micro, reproducible=reproducible, optim=CALM)
        run_to_end(run, world)
        seen.append(losses(run))
    one, two = seen
    assert [one[s][1] for s in one] == [two[s][1] for s in two]
    if reproducible:
        assert one == two
    assert max(abs(one[s][0] - two[s][0]) for s in one) < 1e-4 and len({loss for loss, _ in one.values()}) == 4


def test_resume_is_exact_and_the_encoder_is_plain_timm(reference, tmp_path):
    import timm
    from safetensors.torch import load_file
    from test_kills import StopAt

    for name in ("whole", "run"):
        prepare(reference, tmp_path / name, 2, method="mae", steps=6, dtype="bf16", micro_batch=4)
    run_to_end(tmp_path / "whole", 2)
    run_to_end(tmp_path / "run", 2, StopAt(3))
    assert not (tmp_path / "run/final").exists()
    run_to_end(tmp_path / "run", 2)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole") and len(losses(tmp_path / "run")) == 6
    whole, again = (load_file(tmp_path / name / "final/encoder.safetensors") for name in ("whole", "run"))
    assert all(whole[k].equal(again[k]) for k in whole)
    description = arch.describe("vit_micro", 32)
    plain = timm.create_model(description["architecture"], num_classes=0, **description["model_args"])
    plain.load_state_dict(whole)  # strict: the frozen position embeddings are there
    assert torch.allclose(plain.pos_embed[0], arch.sincos_positions(4, 4, 128), atol=2**-8)
    assert plain(torch.zeros(2, 3, 32, 32)).shape == (2, 128)


@pytest.mark.parametrize("change", ["checkpointed", "compiled"])
def test_less_memory_and_compilation_change_nothing(change):
    (plain, _), (method, _), graphs, views = build(), build(), [], inputs()
    if change == "checkpointed":
        method.encoder.set_grad_checkpointing(True)
    else:
        method.encoder.compile(backend=lambda graph, inputs: graphs.append(1) or graph.forward)
    for order in (views[1], views[1].flip(1)):
        ours, theirs = (m([views[0], order], None)["error"].mean() for m in (method, plain))
        assert torch.allclose(ours, theirs, atol=1e-5)
        gradients = [torch.autograd.grad(x, list(trained(m))) for x, m in ((ours, method), (theirs, plain))]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))
    assert len(graphs) == (1 if change == "compiled" else 0), "other masks need no other graph"


def trained(method):
    return (p for p in method.parameters() if p.requires_grad)


def test_flops_and_memory_are_of_what_is_computed():
    """ViT-B/16 and the paper's decoder: 50 tokens through 12 layers of 768, 197 through 8 of 512."""
    config = TrainConfig(method="mae", arch="vit_base")
    method = MAE(arch.create(arch.describe("vit_base", 224)), config)
    assert method.passes(config) == [(50, 768, 12), (197, 512, 8)]
    layers = sum(n * (24 * s * w**2 + 4 * s**2 * w) for s, w, n in method.passes(config))
    ends = 2 * 196 * 768 * 768 + 2 * 50 * 768 * 512 + 2 * 196 * 512 * 768  # patches, into the decoder, out of it
    counted = training_flops(method, blank(1, method.views(config), method.shuffles), None)
    assert counted == pytest.approx(3 * (layers + ends), rel=1e-3)
    assert activation_bytes(config, method.passes(config)) == 34 * (50 * 768 * 12 + 197 * 512 * 8)
    config.activation_checkpointing, config.dtype = True, "fp32"
    assert activation_bytes(config, method.passes(config)) == 2 * (50 * 768 * (24 + 34) + 197 * 512 * (16 + 34))


@pytest.mark.parametrize(
    ("mae", "words"),
    [
        (MAEConfig(mask_ratio=1.0), "mask-ratio 1 must lie"),
        (MAEConfig(decoder_width=100), "100 must be a multiple of 4 and of the 16 heads"),
        (MAEConfig(decoder_depth=0), "must be positive"),
    ],
)
def test_what_cannot_work_is_refused_at_submit(mae, words):
    with pytest.raises(UsageError, match=words):
        check(TrainConfig(data=["x"], method="mae", mae=mae))


def test_an_encoder_without_positions_is_refused():
    with pytest.raises(UsageError, match="needs a ViT with position embeddings"):
        config = small_config("-", "-", method="mae", arch="convnext_atto")
        MAE(arch.create({"architecture": "convnext_atto", "num_classes": 0, "model_args": {}}), config)
