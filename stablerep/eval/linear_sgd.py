"""Linear probe for large sets, as the paper's on ImageNet: SGD on features of random crops, a grid of learning rates at once,
each without and with BatchNorm (no affine) before the classifier (arXiv 2306.00984; official main_linear.py)."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stablerep.data.chance import derive
from stablerep.eval.config import SgdConfig
from stablerep.eval.datasets import Dataset, Files, Labelled
from stablerep.eval.encoders import Encoder
from stablerep.eval.metrics import value_of
from stablerep.eval.resume import load_epoch, save_epoch
from stablerep.runtime import dist
from stablerep.runtime.errors import UsageError

CHECKPOINT = "linear.pt"
HELD_OUT, AT_MOST = 0.1, 10_000  # share, and number, of training pictures that choose among the classifiers


class Heads(nn.Module):
    """A linear classifier for each learning rate, on the features as they are and on standardised ones."""

    def __init__(self, width: int, classes: int, rates: list[float]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.linear = nn.ModuleList(self._linear(width, classes) for _ in range(2 * len(rates)))
        self.names = [(rate, norm) for norm in (False, True) for rate in rates]

    @staticmethod
    def _linear(width: int, classes: int) -> nn.Linear:
        head = nn.Linear(width, classes)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        return head

    def forward(self, features: Tensor) -> list[Tensor]:
        """Logits [B, C] of each head for features [B, D]."""
        inputs = {False: features, True: self.norm(features)}
        return [head(inputs[norm]) for head, (_, norm) in zip(self.linear, self.names, strict=True)]


def make_optimizer(heads: Heads, batch: int) -> torch.optim.SGD:
    """SGD with momentum 0.9; the peak learning rate of each head is its rate * batch / 256."""
    groups = [
        {"params": head.parameters(), "peak": rate * batch / 256}
        for head, (rate, _) in zip(heads.linear, heads.names, strict=True)
    ]
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9)


def train_heads(
    batches: Iterable[tuple[Tensor, Tensor]], heads: Heads, optimizer: torch.optim.SGD, steps: int, first: int = 0
) -> None:
    """Steps of SGD on features [B, D] and labels [B], `first` of `steps` being done; the rates fall to 0 by half a cosine."""
    heads.train()
    for step, (features, labels) in enumerate(batches, first):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (1 + math.cos(math.pi * step / steps)) / 2
        losses = [nn.functional.cross_entropy(logits, labels) for logits in heads(features)]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()


def sgd_scores(
    encoder: Encoder, data: Dataset, features: Callable[[Labelled], np.ndarray], config: SgdConfig, seed: int, device: str,
    workers: int, folder: Path, report: Callable[[str], None],
) -> np.ndarray:  # fmt: skip
    """Class scores [N, C] of the test split by the classifier that does best on the validation split, or on a held-out part of
    the training split where there is none. `folder` keeps the newest checkpoint of this very probe. Collective. Raises
    UsageError, or WorkError where the folder cannot be written."""
    if data.train.labels.ndim == 2:
        raise UsageError(f"--solver sgd needs one class a picture: {data.name} has several")
    train, held = (data.train, data.val) if data.val is not None else hold_out(data.train, seed)
    batch = min(config.batch, len(train)) // dist.world() * dist.world()
    if batch < 2:
        raise UsageError(f"{len(train)} training pictures are too few for {dist.world()} ranks")
    torch.manual_seed(seed)
    heads = Heads(encoder.model.num_features, len(data.classes), config.rates).to(device)
    optimizer, an_epoch, clock = make_optimizer(heads, batch), len(train) // batch, time.monotonic()
    identity = {"settings": asdict(config), "batch": batch, "seed": seed}
    start = load_epoch(folder / CHECKPOINT, identity, heads, optimizer, device)
    for epoch in range(start, config.epochs):
        crops = _crops(encoder, train, config, batch, seed, epoch, device, workers)
        train_heads(crops, heads, optimizer, config.epochs * an_epoch, epoch * an_epoch)
        save_epoch(folder / CHECKPOINT, {**identity, "epoch": epoch + 1}, heads, optimizer)
        done, seconds = epoch + 1 - start, time.monotonic() - clock
        rate, left = done * an_epoch * batch / seconds, seconds / done * (config.epochs - epoch - 1)
        report(f"linear: epoch {epoch + 1}/{config.epochs}  {rate:,.0f} pictures/s  {left:,.0f} s left")
    best, value = choose(heads, features(held), held.labels, data.metric, device)
    rate, norm = heads.names[best]
    report(f"linear: best of {len(heads.names)} on {len(held)} held-out pictures: lr {rate:g}"
           f"{' with BatchNorm' if norm else ''} ({value:.2f} %)")  # fmt: skip
    return logits_of(heads, features(data.test), device)[best]


def hold_out(train: Labelled, seed: int) -> tuple[Labelled, Labelled]:
    """A tenth of each class, 10,000 pictures at most, apart from the rest."""
    from sklearn.model_selection import train_test_split

    count, classes = min(AT_MOST, int(HELD_OUT * len(train))), len(np.unique(train.labels))
    try:
        kept, held = train_test_split(
            np.arange(len(train)), test_size=max(count, classes), random_state=seed, stratify=train.labels
        )
    except ValueError as error:
        raise UsageError(f"linear probe: no part of each class can be held out: {error}") from None
    return train.take(np.sort(kept)), train.take(np.sort(held))


@torch.inference_mode()
def logits_of(heads: Heads, features: np.ndarray, device: str) -> list[np.ndarray]:
    """Logits [N, C] of each head for features [N, D]."""
    heads.eval()
    chunks = [[x.cpu().numpy() for x in heads(chunk.to(device))] for chunk in torch.from_numpy(features).split(1024)]
    return [np.concatenate(parts) for parts in zip(*chunks, strict=True)]


def choose(heads: Heads, features: np.ndarray, labels: np.ndarray, metric: str, device: str) -> tuple[int, float]:
    """The head with the best metric on held-out features, and that metric in percent."""
    values = [value_of(metric, scores, labels) for scores in logits_of(heads, features, device)]
    best = int(np.argmax(values))
    return best, values[best]


class Crops(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Random-resized crops, flipped half of the time: uint8 [3, S, S] and the label. A function of the seed, the epoch and the
    picture, whoever makes it."""

    def __init__(self, split: Labelled, crop_min: float, seed: int, epoch: int) -> None:
        from torchvision import transforms

        size = int(split.pictures.shape[-1])
        crop = transforms.RandomResizedCrop(size, (crop_min, 1.0), antialias=True)
        self.transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor()])
        self.split, self.seed, self.epoch = split, seed, epoch

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        from PIL import Image

        pictures = self.split.pictures
        picture: Any = pictures.open(row) if isinstance(pictures, Files) else Image.fromarray(pictures[row].transpose(1, 2, 0))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive("linear crop", self.seed, self.epoch, row))  # torch.manual_seed is slow
            return self.transform(picture), int(self.split.labels[row])


def _crops(
    encoder: Encoder, train: Labelled, config: SgdConfig, batch: int, seed: int, epoch: int, device: str, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and labels of the whole batches of an epoch, on every rank alike: each rank encodes its share, then all are
    gathered, and train the same small classifiers."""
    model, world = encoder.model.to(device).eval(), dist.world()
    own, batches = batch // world, len(train) // batch
    order = np.random.default_rng(derive("linear order", seed, epoch)).permutation(len(train))[: batches * batch]
    rows = order.reshape(batches, world, own)[:, dist.rank()].ravel()
    crops = Crops(train, config.crop_min, seed, epoch)
    for pictures, labels in DataLoader(crops, own, sampler=rows.tolist(), num_workers=workers, pin_memory=device != "cpu"):
        with torch.no_grad():
            features = model(pictures.to(device, non_blocking=True).float() / 127.5 - 1).float()
        yield dist.gather_plain(features), dist.gather_plain(labels.to(device))
