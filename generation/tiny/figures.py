"""Figures of the model card: does a classifier of real pictures name the generated ones rightly, and do they vary?

python generation/tiny/figures.py --source FOLDER
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from stablerep.runtime.config import key, parse, run_command


@dataclass
class FiguresConfig:
    """What is measured."""

    source: str = key("", "folder with the four Fashion-MNIST .gz files")
    model: str = key("tiny", "the pipeline")
    steps: int = key(700, "training steps of the classifier")
    noises: int = key(4, "images a caption; 80 captions (ten classes, eight colours)")


def train_classifier(source: Path, steps: int) -> tuple[Any, float]:
    """A small CNN trained on tinted real pictures, and its accuracy (percent) on tinted official test pictures."""
    import numpy as np
    import torch
    from torch import nn

    from generation.tiny.data import CLASSES, COLOURS, generator_part, load, tint

    torch.manual_seed(0)
    random = np.random.default_rng(0)
    layers: list[nn.Module] = []
    for a, b in ((3, 24), (24, 48), (48, 96)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 16, len(CLASSES)))
    pictures, labels = generator_part(source)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        rows = random.integers(len(labels), size=128)
        x = torch.from_numpy(tint(pictures[rows], random.integers(len(COLOURS), size=128)))
        loss = nn.functional.cross_entropy(model(x), torch.from_numpy(labels[rows].astype("int64")))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    real, truth = load(source, "t10k")
    with torch.no_grad():
        guess = model(torch.from_numpy(tint(real[:3000], random.integers(len(COLOURS), size=3000)))).argmax(1).numpy()
    return model, 100 * float((guess == truth[:3000]).mean())


def main(argv: list[str]) -> int:
    """Print one line a guidance scale."""
    config = parse(FiguresConfig, argv, prog="figures.py", about="Fidelity and diversity of the embedded pipeline.")
    import torch

    from generation.identity import caption_id
    from generation.pipeline import TextToImage
    from generation.settings import GenerateConfig, resolve
    from generation.tiny.data import CLASSES, COLOURS, caption

    classifier, accuracy = train_classifier(Path(config.source), config.steps)
    print(f"classifier on real test pictures: {accuracy:.1f} %", flush=True)
    wanted = [(c, k) for k in range(len(CLASSES)) for c in range(len(COLOURS))]
    texts = [caption(c, k, 0) for c, k in wanted]
    for scale in (1.0, 2.0, 4.0, 8.0):
        settings = resolve(GenerateConfig(out="-", model=config.model, guidance_scale=scale), 0)
        model = TextToImage(settings, "cpu")
        states = model.encode(texts)
        right, spread = 0, 0.0
        for i in range(0, len(texts), 4):
            rows = [r for r in range(i, i + 4) for _ in range(config.noises)]
            images = model.generate(states[rows], [caption_id(texts[r]) for r in rows], list(range(config.noises)) * 4)
            x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.no_grad():
                guess = classifier(x).argmax(1)
            right += int((guess == torch.tensor([wanted[r][1] for r in rows])).sum())
            spread += float(((x + 1) / 2).reshape(4, config.noises, -1).std(1).mean()) * 4
        n = len(texts) * config.noises
        print(
            f"w={scale:g}: named rightly {100 * right / n:.1f} % of {n}; std over noises {spread / len(texts):.3f}", flush=True
        )
    return 0


if __name__ == "__main__":
    run_command(main)
