"""Fine-tuning of a whole encoder with MAE's recipe (arXiv 2111.06377, table 9), in timm's pieces.

All ranks of a process group share a batch (DDP); without a group it runs alone. Every epoch ends with a checkpoint, and
every random number is a pure function of the seed and of where it is used: a fine-tuning that was killed goes on, on as many
ranks, as if it had not been.
"""

import copy
import hashlib
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stablerep.data.chance import derive
from stablerep.eval.datasets import TOP_1, Labelled
from stablerep.eval.encoders import digest
from stablerep.eval.finetune_config import FinetuneConfig
from stablerep.eval.metrics import measure
from stablerep.eval.resume import load_epoch, save_epoch
from stablerep.eval.score import Score
from stablerep.runtime import dist
from stablerep.runtime.errors import UsageError, WorkError

CHECKPOINT = "finetune.pt"
FREE = {"micro_batch", "workers"}  # settings that may differ when a fine-tuning goes on


def finetune(
    encoder: Any,
    train: Labelled,
    test: Labelled,
    classes: Sequence[str],
    config: FinetuneConfig,
    device: str,
    folder: Path,
    report: Callable[[str], None],
    metric: str = TOP_1,
) -> Score:
    """Train a copy of a timm ViT and a new head on `train`; the metric in percent on `test` after the last epoch.

    `folder` keeps the newest checkpoint; where it holds one of the same encoder, settings and labels, the fine-tuning goes
    on from there. `report` gets a line an epoch, on rank 0. The test split chooses nothing. Collective; seeds the global
    generators. Raises UsageError, or WorkError where the loss is not finite or the folder cannot be written.
    """
    batch, micro = batch_sizes(config, len(train.labels), dist.world())
    steps = len(train.labels) // batch
    model = classifier(encoder, len(classes), config).to(device)
    optimizer = make_optimizer(model, config, config.lr * batch / 256)
    schedule = make_schedule(optimizer, config, steps)
    identity = _identity(encoder, train.labels, config)
    start = load_epoch(folder / CHECKPOINT, identity, model, optimizer, device)
    trained: Any = nn.parallel.DistributedDataParallel(model) if dist.world() > 1 else model
    mixup, clock = make_mixup(config, len(classes)), time.monotonic()
    for epoch in range(start, config.epochs):
        loss = _train_epoch(trained, optimizer, schedule, mixup, train, config, epoch, steps, batch, micro, device)
        if not np.isfinite(loss):
            raise WorkError(
                f"fine-tuning: the loss is not finite in epoch {epoch + 1}: lower the learning rate (now {config.lr:g})"
            )
        save_epoch(folder / CHECKPOINT, {**identity, "epoch": epoch + 1}, model, optimizer)
        if dist.rank() == 0:
            done, seconds = epoch + 1 - start, time.monotonic() - clock
            rate = done * steps * batch / seconds
            left = seconds / done * (config.epochs - epoch - 1)
            report(
                f"fine-tuning: epoch {epoch + 1}/{config.epochs}  loss {loss:.3f}  {rate:,.0f} pictures/s  {left:,.0f} s left"
            )
    scores = _class_scores(model, test, len(classes), config, device)
    return measure(metric, scores, test.labels, setting_of(config, len(train.labels), dist.world()))


def setting_of(config: FinetuneConfig, pictures: int, ranks: int) -> dict[str, Any]:
    """What names the number of a fine-tuning on so many pictures. Raises UsageError where the batch does not fit."""
    return {**_settings(config), "batch": batch_sizes(config, pictures, ranks)[0]}


def batch_sizes(config: FinetuneConfig, pictures: int, ranks: int) -> tuple[int, int]:
    """Pictures a step over all ranks, and pictures that a rank encodes at once. mixup pairs pictures: both are even on each
    rank. Raises UsageError."""
    unit = 2 * ranks
    batch = min(config.batch, pictures // unit * unit)
    if batch < unit or batch % unit:
        raise UsageError(
            f"fine-tuning: a batch of {min(config.batch, pictures)} pictures does not divide into pairs on {ranks} ranks: "
            f"give a multiple of {unit}, and at least as many training pictures"
        )
    if not 0 <= config.warmup_epochs < config.epochs:
        raise UsageError(f"fine-tuning: a warm-up of {config.warmup_epochs:g} epochs leaves nothing of {config.epochs}")
    rows = batch // ranks
    return batch, max(n for n in range(2, rows + 1, 2) if rows % n == 0 and n <= max(2, config.micro_batch))


def classifier(encoder: Any, classes: int, config: FinetuneConfig) -> Any:
    """A copy of the encoder with a linear head that starts near zero, and stochastic depth that rises with the layers."""
    from timm.layers import DropPath, calculate_drop_path_rates, trunc_normal_

    model = copy.deepcopy(encoder)
    model.reset_classifier(classes)
    _seed("head", config.seed)
    trunc_normal_(model.head.weight, std=2e-5)
    nn.init.zeros_(model.head.bias)
    rates: Any = calculate_drop_path_rates(config.drop_path, len(model.blocks))
    for block, rate in zip(model.blocks, rates, strict=True):
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
    return model.requires_grad_(True)


def make_optimizer(model: Any, config: FinetuneConfig, rate: float) -> torch.optim.Optimizer:
    """AdamW (0.9, 0.999); a group's `lr_scale` is layer_decay to the power of the layers above it, the head being the top."""
    from timm.optim import create_optimizer_v2

    return create_optimizer_v2(
        model, opt="adamw", lr=rate, weight_decay=config.weight_decay, layer_decay=config.layer_decay, betas=(0.9, 0.999)
    )


def make_schedule(optimizer: torch.optim.Optimizer, config: FinetuneConfig, steps: int) -> Any:
    """timm's schedule by steps, `steps` an epoch: linear warm-up from 0, then a cosine to 0."""
    from timm.scheduler import CosineLRScheduler

    warmup = round(config.warmup_epochs * steps)
    return CosineLRScheduler(
        optimizer, t_initial=config.epochs * steps - warmup, warmup_t=warmup, warmup_prefix=True, t_in_epochs=False
    )


def make_mixup(config: FinetuneConfig, classes: int) -> Any:
    """timm's mixup or cutmix, either for half of the batches, and label smoothing: (pictures, labels) -> both mixed."""
    from timm.data import Mixup

    mixes = config.mixup > 0 or config.cutmix > 0
    return Mixup(config.mixup, config.cutmix, prob=float(mixes), label_smoothing=config.smoothing, num_classes=classes)


class Augmented(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Augmented training pictures float32 [3, S, S] in [-1, 1] with labels; a picture's augmentation is a function of the
    seed, the epoch and its place in the split, whichever worker or rank makes it."""

    def __init__(self, split: Labelled, config: FinetuneConfig, epoch: int) -> None:
        from timm.data import create_transform

        self.split, self.seed, self.epoch = split, config.seed, epoch
        try:
            self.transform = create_transform(
                int(split.pictures.shape[-1]), is_training=True, scale=(config.crop_min, 1.0), color_jitter=0.0,
                auto_augment=config.augment or None, interpolation="bicubic", re_prob=config.erase, re_mode="pixel",
                mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
            )  # fmt: skip
        except (AssertionError, ValueError) as error:
            raise UsageError(f"fine-tuning: --finetune.augment {config.augment}: {str(error).splitlines()[0]}") from None
        for op in (op for step in self.transform.transforms for op in getattr(step, "ops", ())):  # of RandAugment
            if op.name == "PosterizeIncreasing":
                op.aug_fn = posterize

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        from PIL import Image

        _seed("augment", self.seed, self.epoch, row)
        pictures = self.split.pictures
        if isinstance(pictures, np.ndarray):
            picture = Image.fromarray(np.ascontiguousarray(pictures[row].transpose(1, 2, 0)))
        else:
            picture = pictures.open(row)  # from its file: crops are taken of the whole picture
        return self.transform(picture), int(self.split.labels[row])


def posterize(picture: Any, bits: int, **_: Any) -> Any:
    """timm's operation: the upper `bits` of each value. At magnitude 10 that is none, which leaves black, as it always did;
    newer versions of Pillow refuse it."""
    from PIL import Image, ImageOps

    return ImageOps.posterize(picture, bits) if bits else Image.new(picture.mode, picture.size)


def _train_epoch(
    model: Any, optimizer: Any, schedule: Any, mixup: Any, train: Labelled, config: FinetuneConfig,
    epoch: int, steps: int, batch: int, micro: int, device: str,
) -> float:  # fmt: skip
    """One epoch over `steps` batches; the mean loss over batches and ranks."""
    from timm.loss import SoftTargetCrossEntropy

    rank, world, pieces = dist.rank(), dist.world(), batch // dist.world() // micro
    order = np.random.default_rng(derive("order", config.seed, epoch)).permutation(len(train.labels))[: steps * batch]
    loader = torch.utils.data.DataLoader(
        Augmented(train, config, epoch), sampler=order.reshape(-1, world)[:, rank].tolist(), batch_size=micro,
        num_workers=config.workers, pin_memory=device != "cpu",
    )  # fmt: skip
    criterion, total = SoftTargetCrossEntropy(), torch.zeros((), device=device)
    model.train()
    for i, (pictures, labels) in enumerate(loader):
        last = (i + 1) % pieces == 0
        _seed("mix", config.seed, epoch, i, rank, device=device)
        pictures, targets = mixup(pictures.to(device, non_blocking=True), labels.to(device, non_blocking=True))
        with nullcontext() if last or world == 1 else model.no_sync():
            with torch.autocast("cuda", torch.bfloat16, enabled=device != "cpu"):
                loss = criterion(model(pictures).float(), targets) / pieces
            loss.backward()
        total += loss.detach()
        if last:
            schedule.step_update(epoch * steps + i // pieces)
            optimizer.step()
            optimizer.zero_grad()
    return dist.mean_over_ranks(total / steps)


@torch.no_grad()
def _class_scores(model: Any, test: Labelled, classes: int, config: FinetuneConfig, device: str) -> np.ndarray:
    """Logits float32 [N, C] of the whole split, whose pictures the ranks share."""
    model.eval()
    own = range(dist.rank(), len(test.labels), dist.world())
    pictures: Any = test.pictures  # indexed row by row, an array or files
    loader: Any = torch.utils.data.DataLoader(pictures, config.micro_batch, sampler=own, num_workers=config.workers)
    scores, done = torch.zeros(len(test.labels), classes, device=device), 0
    for x in loader:
        scores[own.start :: own.step][done : done + len(x)] = model(x.to(device).float() / 127.5 - 1).float()
        done += len(x)
    found: np.ndarray = dist.sum_over_ranks(scores).cpu().numpy()
    return found


def _identity(encoder: Any, labels: np.ndarray, config: FinetuneConfig) -> dict[str, Any]:
    """What must be equal for a fine-tuning to go on."""
    named = hashlib.sha256(digest(encoder).encode() + np.ascontiguousarray(labels).tobytes())
    return {"sha256": named.hexdigest(), "settings": _settings(config)}


def _settings(config: FinetuneConfig) -> dict[str, Any]:
    """Those that decide the result."""
    return {k: v for k, v in asdict(config).items() if k not in FREE}


def _seed(*words: object, device: str = "cpu") -> None:
    """Seed every generator that timm and torch draw from here. Not by torch.manual_seed: without a GPU it notes each call,
    with its stack, for a CUDA that never starts."""
    value = derive(*words)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.default_generator.manual_seed(value)
    if device != "cpu":
        torch.cuda.manual_seed(value)
