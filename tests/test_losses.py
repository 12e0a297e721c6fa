"""The losses against NumPy pseudocode of the papers, lightly, and over real gloo ranks."""

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from stablerep.losses import byol_loss, clip_loss, dino_loss, mocov3_loss, multi_positive_loss, nt_xent_loss


def oracle(features, ids, temperature):
    """StableRep's pseudocode: cross-entropy between the softmax of similarities and the uniform positives."""
    logits = features @ features.T / temperature
    total = 0.0
    for i in range(len(features)):
        others = [k for k in range(len(features)) if k != i]
        row = logits[i, others]
        log_p = row - row.max() - np.log(np.exp(row - row.max()).sum())
        p = np.array([ids[k] == ids[i] for k in others], float)
        if p.sum():
            total -= (p / p.sum() * log_p).sum()
    return total / len(features)


def make(n=24, width=8, seed=0, ids=None):
    g = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(n, width, generator=g, dtype=torch.float64), dim=1).float()
    return features, torch.tensor(ids if ids is not None else [i // 4 for i in range(n)])


@pytest.mark.parametrize("ids", [None, [7, 7, 3, 3, 3, 7, 1, 9] * 3, list(range(24)), [5] * 24])
def test_value_against_numpy(ids):
    features, ids = make(ids=ids)
    ours = multi_positive_loss(features, ids, 0.1)
    assert abs(ours.item() - oracle(features.double().numpy(), ids.numpy(), 0.1)) < 1e-5
    assert torch.isfinite(ours)


def test_gradient_against_finite_differences():
    features, ids = make(8, 4)
    x = features.clone().requires_grad_()
    multi_positive_loss(x, ids, 0.2).backward()
    base = features.double().numpy()
    for i, d in [(0, 0), (3, 2), (7, 3)]:
        up, down = base.copy(), base.copy()
        up[i, d] += 1e-5
        down[i, d] -= 1e-5
        expected = (oracle(up, ids.numpy(), 0.2) - oracle(down, ids.numpy(), 0.2)) / 2e-5
        assert abs(x.grad[i, d].item() - expected) < 1e-4


def test_nt_xent_against_lightly():
    from lightly.loss import NTXentLoss

    a, _ = make(16, seed=1)
    b, _ = make(16, seed=2)
    ours = nt_xent_loss(torch.cat([a, b]), torch.arange(16).repeat(2), 0.5)
    assert abs(ours.item() - NTXentLoss(0.5)(a, b).item()) < 1e-5


def test_byol_against_lightly():
    from lightly.loss import NegativeCosineSimilarity

    p = make(16, seed=1)[0].requires_grad_()
    z = 5 * make(16, seed=2)[0]
    ours = byol_loss(3 * p, z)
    theirs = 2 + 2 * NegativeCosineSimilarity()(3 * p, z)
    assert abs(ours.item() - theirs.item()) < 1e-6
    (a,), (b,) = torch.autograd.grad(ours, [p]), torch.autograd.grad(theirs, [p])
    assert torch.allclose(a, b, atol=1e-7) and a.abs().max() > 1e-3


def mocov3_oracle(queries, keys, temperature):
    """The paper's algorithm 1, function ctr, with the 2 tau of its note."""
    logits = queries @ keys.T / temperature
    log_p = logits - logits.max(1, keepdims=True)
    log_p = log_p - np.log(np.exp(log_p).sum(1, keepdims=True))
    return -2 * temperature * np.mean([log_p[i, i] for i in range(len(logits))])


def test_mocov3_against_numpy():
    q, k = make(24, seed=1)[0].requires_grad_(), make(24, seed=2)[0]
    ours = mocov3_loss(q, k, 0.2)
    base = q.detach().double().numpy()
    assert abs(ours.item() - mocov3_oracle(base, k.double().numpy(), 0.2)) < 1e-6
    (gradient,) = torch.autograd.grad(ours, [q])
    for i, d in [(0, 0), (9, 5), (23, 7)]:
        nudge = np.zeros_like(base)
        nudge[i, d] = 1e-5
        up, down = (mocov3_oracle(base + sign * nudge, k.double().numpy(), 0.2) for sign in (1, -1))
        assert abs(gradient[i, d].item() - (up - down) / 2e-5) < 1e-6
    own = slice(8, 16)  # a rank's rows against the gathered keys
    part = mocov3_loss(q[own], k[own], 0.2, all_keys=k, offset=8)
    rest = [mocov3_loss(q[s], k[s], 0.2, all_keys=k, offset=s.start) for s in (slice(0, 8), slice(16, 24))]
    assert abs((part + sum(rest)).item() / 3 - ours.item()) < 1e-6


@pytest.mark.parametrize("small_crops", [0, 3])
def test_dino_against_lightly(small_crops):
    from lightly.loss import DINOLoss

    student = torch.stack([make(16, width=12, seed=s)[0] for s in range(2 + small_crops)]).requires_grad_()
    teacher = torch.stack([make(16, width=12, seed=s)[0] for s in (20, 21)])
    centre = 0.3 * make(1, width=12, seed=30)[0][0]
    theirs = DINOLoss(output_dim=12, teacher_temp=0.05, student_temp=0.1)
    theirs.center.copy_(centre.view(1, 1, -1))
    want = theirs(list(teacher), list(student), teacher_temp=0.05)
    ours = dino_loss(student, teacher, centre, 0.1, 0.05)
    assert abs(ours.item() - want.item()) < 1e-5
    (a,), (b,) = torch.autograd.grad(ours, [student]), torch.autograd.grad(want, [student])
    assert torch.allclose(a, b, atol=1e-6) and a.abs().max() > 1e-3


def test_batch_norm_of_a_feature_that_hardly_varies():
    from stablerep.heads import GatheredBatchNorm

    x = 10 + 0.01 * torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.BatchNorm1d(8).double()(x.double())
    assert (GatheredBatchNorm(8)(x) - expected).abs().max() < 1e-3


def clip_oracle(images, texts, image_ids, text_ids, scale):
    """CLIP's pseudocode, with a uniform target over all pairs of equal ids."""

    def side(logits, ids, others):
        total = 0.0
        for row, i in zip(logits, ids, strict=True):
            log_p = row - row.max() - np.log(np.exp(row - row.max()).sum())
            p = np.array([o == i for o in others], float)
            total -= (p / p.sum() * log_p).sum()
        return total / len(ids)

    logits = scale * images @ texts.T
    return (side(logits, image_ids, text_ids) + side(logits.T, text_ids, image_ids)) / 2


@pytest.mark.parametrize("text_ids", [[0, 1, 2, 3, 4, 5], [0, 1, 0, 3, 4, 4]])
def test_clip_loss_against_numpy_and_open_clip(text_ids):
    images, _ = make(24, seed=1)
    texts, _ = make(6, seed=2)
    text_ids = torch.tensor(text_ids)
    image_ids = text_ids.repeat_interleave(4)
    ours = clip_loss(images, texts, image_ids, text_ids, 10.0)
    arrays = (images.double().numpy(), texts.double().numpy(), image_ids.numpy(), text_ids.numpy())
    assert abs(ours.item() - clip_oracle(*arrays, 10.0)) < 1e-5
    if len(set(text_ids.tolist())) == 6:
        from open_clip.loss import ClipLoss

        single = clip_loss(images[::4], texts, text_ids, text_ids, 10.0)
        assert abs(single.item() - ClipLoss()(images[::4], texts, torch.tensor(10.0)).item()) < 1e-5


def test_caption_with_one_image_left_is_no_nan_and_a_repeated_caption_is_no_negative():
    features, _ = make(4)
    assert torch.isfinite(multi_positive_loss(features, torch.tensor([1, 2, 2, 2]), 0.1))
    same = features[:1].repeat(4, 1)
    apart = multi_positive_loss(same, torch.tensor([1, 1, 2, 2]), 0.1)
    together = multi_positive_loss(same, torch.tensor([1, 1, 1, 1]), 0.1)
    assert together.item() == pytest.approx(apart.item())  # all alike: log 3, whoever is a positive
    assert multi_positive_loss(features, torch.tensor([1, 1, 1, 1]), 0.1) != multi_positive_loss(
        features, torch.tensor([1, 1, 2, 2]), 0.1
    )


def test_reproducible_adamw_is_adamw():
    from stablerep.optim import ReproducibleAdamW

    runs = []
    for kind in (torch.optim.AdamW, ReproducibleAdamW):
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(37, generator=generator))
        optimizer = kind([p], lr=1e-2, betas=(0.9, 0.98), weight_decay=0.1)
        for _ in range(20):
            p.grad = torch.randn(37, generator=generator)
            optimizer.step()
        runs.append(p.detach().clone())
    assert (runs[0] - runs[1]).abs().max() < 1e-6


def _rank(rank, world, folder, out):
    import torch.distributed as td

    from stablerep.heads import GatheredBatchNorm
    from stablerep.runtime import dist

    torch.set_num_threads(1)
    if world > 1:
        td.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.manual_seed(0)
    layer, norm, scale = torch.nn.Linear(8, 6), GatheredBatchNorm(6), torch.nn.Parameter(torch.tensor(5.0))
    x, ids = make(24, ids=[0, 0, 1, 1, 2, 0, 3, 3] * 3)
    words, _ = make(12, width=6, seed=3)
    words, word_ids = torch.nn.Parameter(words), ids[::2].contiguous()
    each = 24 // world
    own, own_words = slice(rank * each, (rank + 1) * each), slice(rank * each // 2, (rank + 1) * each // 2)
    features = torch.nn.functional.normalize(norm(layer(x[own])), dim=1)
    texts = torch.nn.functional.normalize(words[own_words], dim=1)
    gathered, every = dist.gather_features(features), dist.gather_plain(ids[own])
    loss = multi_positive_loss(features, ids[own], 0.1, all_features=gathered, all_caption_ids=every, offset=dist.offset(each))
    loss = loss + clip_loss(
        features, texts, ids[own], word_ids[own_words], scale,
        all_images=gathered, all_texts=dist.gather_features(texts), all_image_ids=every,
        all_text_ids=dist.gather_plain(word_ids[own_words]),
    )  # fmt: skip
    targets, _ = make(24, width=6, seed=4)
    loss = loss + byol_loss(features, targets[own])
    loss = loss + mocov3_loss(features, targets[own], 0.2, all_keys=dist.gather_plain(targets[own]), offset=dist.offset(each))
    loss = loss + dino_loss(features.expand(3, -1, -1), targets[own].expand(2, -1, -1), torch.zeros(6), 0.1, 0.04)
    loss.backward()
    grads = torch.cat([p.grad.flatten() for p in (layer.weight, norm.weight, norm.bias, words, scale)])
    value = loss.detach().clone()
    if world > 1:  # what DDP and DeepSpeed do
        td.all_reduce(grads)
        td.all_reduce(value)
    if rank == 0:
        torch.save((value / world, grads / world), out)
    if world > 1:
        dist.finish()
        dist.skip_destructors()


@pytest.mark.parametrize("world", [2, 4])
def test_same_loss_and_gradient_on_any_number_of_ranks(tmp_path, world):
    _rank(0, 1, tmp_path, tmp_path / "one")
    mp.spawn(_rank, (world, str(tmp_path), str(tmp_path / "many")), nprocs=world)
    (one, g1), (many, g2) = torch.load(tmp_path / "one"), torch.load(tmp_path / "many")
    assert abs(one - many) < 1e-6 * abs(one) and (g1 - g2).abs().max() < 1e-6 * g1.abs().max() and g1.abs().max() > 1e-3
