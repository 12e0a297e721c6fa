"""Every method learns: after some steps on real pictures a probe on its features beats one on the encoder it began as."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import small_config

from stablerep import arch
from stablerep.data import colour_cpu
from stablerep.data.augment import draw
from stablerep.data.chance import derive, orders, uniforms
from stablerep.data.crop import NUMBERS, crops
from stablerep.eval.datasets import load
from stablerep.eval.features import extract
from stablerep.eval.linear import linear_scores
from stablerep.methods import method_class
from stablerep.text import tokenize
from stablerep.train_config import DINOConfig, MAEConfig, TextConfig

SIZE, ROWS, PER_CAPTION = 32, 60, 6
ENCODER = {  # 16 patches, three layers of width 64
    "architecture": "vit_tiny_patch16_224", "num_classes": 0,
    "model_args": {"img_size": SIZE, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4},
}  # fmt: skip


class Pictures:
    """Fashion-MNIST's training split as files, the class's name as caption."""

    def __init__(self):
        data = load("fashion", SIZE)
        self.train, self.test, self.classes = data.train, data.test, data.classes
        self.files = [_png(picture) for picture in self.train.pictures]

    def batch(self, method, config, step):
        """Views, tokens and ids of a step, made as the loader makes them."""
        rng, unit, labels = np.random.default_rng(step), method.rows_per_unit(PER_CAPTION), self.train.labels
        if method.unit == "caption":
            captions = rng.permutation(np.resize(np.arange(10), ROWS // unit))
            rows = np.concatenate([rng.choice(np.flatnonzero(labels == c), unit, replace=False) for c in captions])
        else:
            captions, rows = labels, rng.choice(len(labels), ROWS, replace=False)
        places, views = np.arange(ROWS), method.views(config)
        numbers = np.stack([uniforms(derive("crop", 0, step, n), places, NUMBERS) for n in range(len(views))], axis=1)
        out = [np.empty((ROWS, 3, view.size, view.size), np.uint8) for view in views]
        for row, image in enumerate(rows):
            crops(self.files[image], views, numbers[row], [pictures[row] for pictures in out])
        draws = [draw(view, 0, step, n, places) for n, view in enumerate(views)]
        tensors = [torch.from_numpy(colour_cpu.colour(*pair)) for pair in zip(out, draws, strict=True)]
        tensors += [torch.from_numpy(orders(derive("shuffle", step, n), places, k)) for n, k in enumerate(method.shuffles)]
        texts = [f"a photo of {self.classes[c]}" for c in captions] if method.reads_text else []
        ids = labels[rows] if method.unit == "caption" else rows
        return tensors, tokenize(texts, config.text.context) if texts else None, torch.from_numpy(ids)

    def score(self, encoder):
        """Top-1 % of a linear probe, mean of 10 labels a class (five draws of them) and 100."""
        train, test = (extract(encoder, split.pictures, "cpu") for split in (self.train, self.test))
        return (self.probe(train, test, 10, draws=5) + self.probe(train, test, 100, draws=1)) / 2

    def probe(self, train, test, per_class, draws):
        scores, labels = [], self.train.labels
        for number in range(draws):
            rng = np.random.default_rng(number)
            few = np.concatenate([rng.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in range(10)])
            guessed = linear_scores((train[few], labels[few]), None, test, 10, "top-1", seed=0).argmax(1)
            scores.append(100 * float((guessed == self.test.labels).mean()))
        return float(np.mean(scores))


def _png(picture):
    file = io.BytesIO()
    Image.fromarray(picture.transpose(1, 2, 0)).save(file, "PNG", compress_level=1)
    return file.getvalue()


@pytest.fixture(scope="module")
def pictures():
    return Pictures()


def encoder_of(method):
    """A plain timm model with the weights of a method's encoder."""
    plain = arch.create(ENCODER)
    plain.load_state_dict(method.encoder.state_dict())
    return plain


# Steps, peak learning rate, momentum of the teacher, and by how many points the probe must gain: about half of what was
# measured.
METHODS = {
    "stablerep": (120, 2e-3, None, 6.0),
    "simclr": (80, 2e-3, None, 6.0),
    "clip": (100, 2e-3, None, 5.0),
    "mae": (300, 4e-3, None, 2.0),
    "byol": (120, 2e-3, 0.97, 4.0),
    "mocov3": (200, 4e-3, 0.9, 2.0),
    "dino": (120, 2e-3, 0.99, 1.5),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_short_training_beats_the_encoder_it_began_as(pictures, name):
    steps, peak, momentum, gain = METHODS[name]
    torch.manual_seed(0)
    sizes = {"image_size": SIZE, "head_hidden": 128, "head_out": 64}
    config = small_config("-", "-", method=name, downsample_p=0.0, momentum=momentum, **sizes)
    config.dino = DINOConfig(prototypes=256, local_crops=2, local_size=16, warmup_epochs=0, freeze_epochs=0)
    config.mae = MAEConfig(decoder_width=64, decoder_depth=1, decoder_heads=4)
    config.text = TextConfig(width=64, layers=2, heads=4, context=12, embed=64)
    method = method_class(name)(arch.create(ENCODER), config)
    before = pictures.score(encoder_of(method))
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
        views, tokens, ids = pictures.batch(method, config, step)
        method.before_step(step, steps, step / 20)
        loss, _ = method.loss(method(views, tokens), ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(step + 1, steps)
    after = pictures.score(encoder_of(method))
    print(f"{name}: {before:.1f} -> {after:.1f}")
    assert after > before + gain
