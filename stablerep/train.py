"""The training loop, top to bottom."""

import time
from pathlib import Path
from typing import Any

import torch

from stablerep import arch, checkpoint
from stablerep.data.augment import augment, draw
from stablerep.data.loader import Rows, batches
from stablerep.data.order import Order
from stablerep.data.shards import DatasetIndex
from stablerep.methods import method_class
from stablerep.optim import learning_rate, parameter_groups
from stablerep.runtime import dist
from stablerep.runtime.config import from_yaml
from stablerep.runtime.errors import UsageError, WorkError
from stablerep.runtime.events import Events
from stablerep.runtime.rundir import append_jsonl, read_json
from stablerep.runtime.stop import StopFlag
from stablerep.train_config import TrainConfig


def make_order(config: TrainConfig, captions: int, stored: int) -> Order:
    """The data order of a run. Raises UsageError where batch, captions and images do not fit."""
    wanted = config.images_per_caption or stored
    if not 1 <= wanted <= stored:
        raise UsageError(f"--images-per-caption {wanted}: the data holds {stored}")
    method = method_class(config.method)
    views = method.views(wanted)
    if config.global_batch % views:
        near = config.global_batch // views * views
        raise UsageError(
            f"--global-batch {config.global_batch} is not a multiple of {views} images a {method.unit}: "
            f"the nearest are {near} and {near + views}"
        )
    order = Order(config.seed, captions, stored, method.unit, views, config.global_batch // views)
    if order.steps_per_epoch < 1:
        raise UsageError(f"--global-batch {config.global_batch} needs more than the {order.units} {method.unit}s of the data")
    return order


def total_steps(config: TrainConfig, order: Order) -> int:
    """Length of the run in steps."""
    epochs = 15.0 if config.epochs is None else config.epochs
    return config.steps or max(1, round(epochs * order.steps_per_epoch))


def make_engine(config: TrainConfig, model: torch.nn.Module, world: int, gpus: bool) -> Any:
    """A DeepSpeed engine around the model, with torch's AdamW (whose state we know how to gather)."""
    import deepspeed
    import deepspeed.ops

    if not gpus:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled; gloo does without
    optim = config.optim
    optimizer = torch.optim.AdamW(parameter_groups(model, optim.weight_decay), lr=0.0, betas=(optim.beta1, optim.beta2))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": config.global_batch // world,
            "gradient_accumulation_steps": 1,
            "zero_optimization": {"stage": config.zero_stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": config.dtype == "bf16"},
            "gradient_clipping": optim.clip,
            "steps_per_print": 1 << 30,
        },
    )
    return engine


def train(run: Path, stop: StopFlag, events: Events) -> str:
    """Train to the end (`done`) or to a stop signal (`stopped`), resuming from the newest complete checkpoint.

    All ranks call it. Raises UsageError or WorkError; a loss that is not finite ends the run with its step.
    """
    config = from_yaml(TrainConfig, run / "config.yaml")
    rank, world = dist.rank(), dist.world()
    device = torch.device("cuda", torch.cuda.current_device()) if _on_gpu() else torch.device("cpu")
    index = DatasetIndex([Path(d) for d in config.data])
    order = make_order(config, len(index), index.images_per_caption)
    if config.global_batch % world:
        raise UsageError(f"--global-batch {config.global_batch} does not divide into {world} ranks")
    steps = int(read_json(run / "train.json")["steps"])
    warmup = min(steps // 2, round(config.optim.warmup_epochs * order.steps_per_epoch))
    peak = config.optim.lr * config.global_batch / 256

    torch.manual_seed(config.seed)  # the same initial weights on every rank
    description = arch.describe(config.arch, config.image_size)
    encoder = arch.create(description)
    model = method_class(config.method)(encoder, config.head_hidden, config.head_out, config.temperature)
    engine = make_engine(config, model, world, device.type == "cuda")
    start = checkpoint.load_newest(run, engine)
    events.write("resumed" if start else "began", step=start, steps=steps)

    rows = Rows(index, config.seed, config.image_size, config.crop_min)
    micro = config.global_batch // world
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    board = _tensorboard(run) if rank == 0 else None
    clock, since = time.monotonic(), start
    saved = start
    for step, (pictures, units) in enumerate(batches(rows, order, start, steps, rank, world, config.workers), start=start):
        draws = draw(config.seed, step, config.global_batch)
        images = augment(pictures.to(device, non_blocking=True), draws, rank * micro).to(dtype)
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, warmup, peak)
        loss = engine(images, units.to(device))
        engine.backward(loss)
        engine.step()
        done = step + 1
        if done % config.log_every == 0 or done == steps:
            mean = dist.mean_over_ranks(loss)
            if mean != mean or mean in (float("inf"), -float("inf")):
                raise WorkError(f"the loss is {mean} at step {done}: lower --optim.lr, or resume from an older checkpoint")
            if rank == 0:
                seconds = time.monotonic() - clock
                record = {
                    "step": done,
                    "loss": mean,
                    "lr": learning_rate(step, steps, warmup, peak),
                    "epoch": done / order.steps_per_epoch,
                    "images_per_s": (done - since) * config.global_batch / seconds,
                    "time": time.time(),
                }
                append_jsonl(run / "metrics.jsonl", record)
                assert board is not None
                for name in ("loss", "lr", "images_per_s"):
                    board.add_scalar(name, record[name], done)
                print(f"step {done}/{steps}  loss {mean:.4f}  {record['images_per_s']:.0f} images/s", flush=True)
            clock, since = time.monotonic(), done
        stopping = dist.any_rank(stop.requested is not None, device)
        if done % config.checkpoint_every == 0 or stopping or done == steps:
            checkpoint.save(run, engine, done, config.keep_every)
            saved = done
            if rank == 0:
                events.write("saved", step=done)
        if stopping and done < steps:
            return "stopped"
    assert saved == steps
    tensors = checkpoint.gather(engine)
    if rank == 0:
        prefix = "param/encoder."
        arch.save_encoder(run / "final", description, {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)})
        events.write("completed", step=steps)
    dist.barrier()
    return "done"


def _on_gpu() -> bool:
    import torch.distributed as td

    return td.is_initialized() and td.get_backend() == "nccl"


def _tensorboard(run: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run / "tensorboard"))
