"""Methods through the interface of the loop: what each asks for, and what it learns from."""

import pytest
import torch
from ranks import small_config

from stablerep import arch
from stablerep.methods import CLASSES, method_class
from stablerep.runtime.errors import UsageError
from stablerep.text import LARGEST_SCALE, tokenize


def build(name, **changes):
    torch.manual_seed(0)
    config = small_config("-", "-", method=name, image_size=16, **changes)
    return method_class(name)(arch.create(arch.describe("vit_micro", 16)), config), config


def inputs(method, config, captions=4, images=3):
    g = torch.Generator().manual_seed(1)
    rows = captions * method.rows_per_unit(images)
    views = [torch.randn(rows, 3, view.size, view.size, generator=g) for view in method.views(config)]
    views += [torch.rand(rows, n, generator=g).argsort(1) for n in method.shuffles]
    texts = [f"a photo of {c}" for c in ("a cat", "a dog", "a red hat", "ten ☃")[:captions]]
    tokens = tokenize(texts, config.text.context) if method.reads_text else None
    return views, tokens, torch.arange(captions).repeat_interleave(rows // captions)


@pytest.mark.parametrize("name", CLASSES)
def test_loss_is_finite_and_falls(name):
    method, config = build(name)
    views, tokens, ids = inputs(method, config)
    optimizer = torch.optim.AdamW(method.parameters(), lr=2e-3)
    with torch.no_grad():
        for _ in range(40 if name == "dino" else 0):  # its loss rises first, until the centre is found
            method.loss(method(views, tokens), ids)
            method.after_step(12, 12)
    seen = []
    for step in range(12):
        method.before_step(step, 12, epoch=2 + step)
        loss, _ = method.loss(method(views, tokens), ids)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.parameters() if p.requires_grad), (
            "every weight is used"
        )
        optimizer.step()
        method.after_step(step + 1, 12)
        seen.append(loss.item())
    assert seen[-1] < 0.8 * seen[0]


@pytest.mark.parametrize("name", CLASSES)
def test_rows_are_encoded_one_by_one(name):
    """What the loop relies on where it encodes a batch in parts."""
    method, config = build(name)
    views, tokens, _ = inputs(method, config)
    whole, cut = method(views, tokens), len(views[0]) // 2
    halves = [
        method([v[s] for v in views], None if tokens is None else tokens[t])
        for s, t in ((slice(cut), slice(2)), (slice(cut, None), slice(2, None)))
    ]
    for key, value in whole.items():
        assert torch.allclose(value, torch.cat([h[key] for h in halves]), atol=1e-5)


def test_plus_is_the_weighted_sum_of_its_parts():
    method, config = build("stablerep_plus", image_weight=2.0, text_weight=0.5)
    views, tokens, ids = inputs(method, config)
    loss, parts = method.loss(method(views, tokens), ids)
    assert loss.item() == pytest.approx(2 * parts["image_loss"].item() + 0.5 * parts["text_loss"].item(), rel=1e-6)


def test_logit_scale_is_clamped():
    method, _ = build("clip")
    method.image_text.logit_scale.data.fill_(9.0)
    method.after_step(1, 2)
    assert method.image_text.logit_scale.item() == pytest.approx(LARGEST_SCALE)


def test_a_caption_that_is_too_long_is_cut_and_one_of_bytes_is_read():
    tokens = tokenize(["word " * 100, "naïve ☃ 日本", ""], 16)
    assert tokens.shape == (3, 16) and (tokens.argmax(1) == torch.tensor([15, tokens[1].argmax(), 1])).all()


def test_unknown_method_names_the_known_ones():
    with pytest.raises(UsageError, match="stablerep, stablerep_plus, simclr, clip"):
        method_class("dinosaur")
