"""What follows from a training config, its data and the number of ranks: checked when a run is submitted, used when it runs."""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stablerep.data.index import Index, build_index, open_index
from stablerep.data.order import Order
from stablerep.methods import method_class
from stablerep.runtime.config import from_yaml, to_dict, to_yaml
from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import write_atomic, write_json
from stablerep.train_config import FREE, TrainConfig

CHOICES = {"dtype": ("bf16", "fp16", "fp32"), "zero_stage": (1, 2)}
POSITIVE = ("global_batch", "image_size", "checkpoint_every", "log_every", "hang_timeout_s", "head_hidden", "head_out")
EPOCHS = 15.0


@dataclass
class TrainPlan:
    """The length of a run and the order of its data."""

    order: Order
    steps: int
    warmup: int  # steps
    peak_lr: float
    rows_per_unit: int


def make_plan(config: TrainConfig, index: Index, ranks: int) -> TrainPlan:
    """Check config against the data and the number of ranks. Raises UsageError, one line that says what would fit."""
    check(config)
    method = method_class(config.method)
    wanted = config.images_per_caption or min(source.fewest for source in index.sources)
    rows_per_unit = method.rows_per_unit(wanted)
    if config.global_batch % rows_per_unit:
        raise UsageError(
            f"--global-batch {config.global_batch} is not a multiple of {rows_per_unit} images a {method.unit}: "
            f"the nearest are {_around(config.global_batch, rows_per_unit)}"
        )
    order = Order(
        config.seed, index, method.unit, rows_per_unit, config.global_batch // rows_per_unit, config.data_weights or None
    )
    check_ranks(config, ranks, rows_per_unit if method.reads_text else 1)
    epochs = EPOCHS if config.epochs is None else config.epochs
    steps = config.steps or max(1, round(epochs * order.steps_per_epoch))
    warmup = min(steps // 2, round(config.optim.warmup_epochs * order.steps_per_epoch))
    return TrainPlan(order, steps, warmup, config.optim.lr * config.global_batch / 256, rows_per_unit)


def freeze(config: TrainConfig, run: Path, ranks: int, report: Callable[[str], None] = print) -> TrainPlan:
    """Make the index of the data, check everything, and write what a run starts from: index/, config.yaml, train.json.

    Raises UsageError, having written nothing; a run that exists keeps its index and must have the same settings.
    """
    existed = check_run(config, run)
    if (run / "train.json").exists():
        plan = make_plan(config, open_index(run / "index"), ranks)
    else:
        try:
            build_index(config.data, run / "index", report)
            plan = make_plan(config, open_index(run / "index"), ranks)
        except BaseException:
            shutil.rmtree(run / "index" if existed else run, ignore_errors=True)
            raise
    write_atomic(run / "config.yaml", to_yaml(config))
    write_json(run / "train.json", {"steps": plan.steps, "ranks": ranks})
    return plan


def freeze_config(config: TrainConfig, run: Path) -> None:
    """Write only the config of a run whose data is still to be made; the job calls `freeze` at its start. Raises UsageError."""
    check_run(config, run)
    write_atomic(run / "config.yaml", to_yaml(config))


def check_run(config: TrainConfig, run: Path) -> bool:
    """Raise UsageError where `config` cannot work, or `run` is another run or no training run; whether the folder exists."""
    check(config)
    if (run / "config.yaml").exists():
        check_same(config, from_yaml(TrainConfig, run / "config.yaml"), run)
    elif run.exists() and any(p.name != "logs" for p in run.iterdir()):
        raise UsageError(f"{run} exists and is not a training run: choose another --out")
    return run.exists()


def try_out(config: TrainConfig, run: Path, ranks: int) -> TrainPlan:
    """What `freeze` would find, without a trace in the run folder. Raises UsageError."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "run"
        for name in ("index", "config.yaml", "train.json") if (run / "train.json").exists() else ():
            place.mkdir(exist_ok=True)
            (place / name).symlink_to(run / name)
        return freeze(config, place, ranks)


def check_same(new: TrainConfig, old: TrainConfig, run: Path) -> None:
    """Raise UsageError, naming each key, where a run would go on with settings that change what is computed."""
    before, after = to_dict(old), to_dict(new)
    changed = [f"{k} {before[k]} -> {after[k]}" for k in after if k not in FREE and before[k] != after[k]]
    if changed:
        raise UsageError(f"{run} was trained with other settings ({'; '.join(changed)}): use another --out")


def check(config: TrainConfig) -> None:
    """Raise UsageError on a value that cannot work."""
    if not config.data:
        raise UsageError("--data is missing: generation runs, folders of WebDataset tars, or folders of pictures")
    method_class(config.method).check(config)
    for name, values in CHOICES.items():
        if getattr(config, name) not in values:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(config, name)} is none of {', '.join(map(str, values))}")
    for name in POSITIVE:
        if getattr(config, name) <= 0:
            raise UsageError(f"--{name.replace('_', '-')} must be positive")
    if config.steps is not None and config.steps < 1:
        raise UsageError("--steps must be at least 1")
    pieces = config.reproducible
    if pieces and (pieces < 1 or pieces & (pieces - 1)):
        raise UsageError(f"--reproducible {pieces} is not a power of two")
    if pieces and config.dtype == "fp16":
        raise UsageError("--reproducible works with bf16 and fp32: fp16's loss scale is not applied piece by piece")


def check_ranks(config: TrainConfig, ranks: int, unit: int) -> None:
    """Raise UsageError where the batch does not divide; `unit` rows must stay together."""
    if config.global_batch % (ranks * unit):
        raise UsageError(
            f"--global-batch {config.global_batch} does not divide into {ranks} ranks"
            + (f" of whole captions ({unit} images)" if unit > 1 else "")
            + f": with {ranks} ranks the nearest are {_around(config.global_batch, ranks * unit)}; "
            f"this batch fits {_fitting(config.global_batch, unit, ranks)} ranks"
        )
    pieces = config.reproducible
    if pieces and (pieces % ranks or config.global_batch % (pieces * unit)):
        raise UsageError(
            f"--reproducible {pieces}: must divide --global-batch {config.global_batch} and be a multiple of the {ranks} ranks"
        )
    rows = config.global_batch // (pieces or ranks)
    if config.micro_batch is not None and (rows % config.micro_batch or config.micro_batch % unit):
        raise UsageError(f"--micro-batch {config.micro_batch} does not divide the {rows} images of a rank")


def micro_batch(config: TrainConfig, rows: int, unit: int, bytes_an_image: float, memory: float) -> int:
    """Images that a rank encodes at once: the most that divide its `rows`, are a multiple of `unit`, and fit `memory`."""
    if config.reproducible:
        return config.global_batch // config.reproducible
    if config.micro_batch is not None:
        return config.micro_batch
    fitting = [m for m in range(unit, rows + 1, unit) if rows % m == 0 and m * bytes_an_image <= memory]
    return max(fitting, default=unit)


def activation_bytes(config: TrainConfig, passes: list[tuple[int, int, int]]) -> float:
    """Activations that transformers keep for the backward pass of one image, (tokens, width, layers) each: 34 bytes a token,
    width and layer at 16 bits (Korthikanti et al., arXiv 2205.05198, equation 2, without the attention matrix, which fused
    attention does not keep); with activation checkpointing the layers' inputs and one layer."""
    kept = sum(
        tokens * width * (2 * layers + 34 if config.activation_checkpointing else 34 * layers)
        for tokens, width, layers in passes
    )
    return kept * (2.0 if config.dtype == "fp32" else 1.0)


def usable_memory(device: Any, ranks_here: int, parameters: int) -> float:
    """Bytes for activations on a device: nine tenths of a GPU, or half of the host's memory shared by its ranks, less 20
    bytes a parameter (weights, gradients, master, moments, not counting on ZeRO's savings)."""
    if device.type == "cuda":
        import torch

        total = 0.9 * torch.cuda.get_device_properties(device).total_memory
    else:
        total = 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks_here
    return total - 20.0 * parameters


def _around(value: int, step: int) -> str:
    low = value // step * step
    return f"{low} and {low + step}" if low else str(step)


def _fitting(batch: int, unit: int, ranks: int) -> str:
    counts = [n for n in range(1, batch // unit + 1) if batch % (n * unit) == 0]
    below, above = [n for n in counts if n < ranks][-2:], [n for n in counts if n > ranks][:2]
    return " or ".join(map(str, below + above))
