"""The training loop, top to bottom."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from stablerep import arch, checkpoint, plan
from stablerep.data.index import open_index
from stablerep.data.loader import batches, blank
from stablerep.engine import full_parameter, make_engine, set_rates
from stablerep.methods import method_class
from stablerep.metrics import Metrics, peak_flops, training_flops
from stablerep.optim import learning_rate, weight_decay
from stablerep.runtime import dist
from stablerep.runtime.config import from_yaml
from stablerep.runtime.errors import WorkError
from stablerep.runtime.events import Events
from stablerep.runtime.rundir import read_json
from stablerep.runtime.stop import StopFlag
from stablerep.runtime.watchdog import Watchdog, collective_timeout
from stablerep.step import Step
from stablerep.text import tokenize
from stablerep.train_config import TrainConfig

NONFINITE_LIMIT = 20  # steps in a row; fp16's loss scale halves at each, from 65,536 down to where it is no cure


def train(run: Path, stop: StopFlag, events: Events, watchdog: Watchdog, life: str, ranks_here: int = 1) -> str:
    """Train to the end (`done`) or to a stop signal (`stopped`), resuming from the newest complete checkpoint.

    All ranks call it; `ranks_here` share this machine's memory. Raises UsageError or WorkError, one line each.
    """
    config = from_yaml(TrainConfig, run / "config.yaml")
    rank, world, device = dist.rank(), dist.world(), _device()
    index = open_index(run / "index")
    planned = plan.make_plan(config, index, world)
    steps, rows = int(read_json(run / "train.json")["steps"]), config.global_batch // world

    torch.manual_seed(config.seed)  # the same initial weights on every rank
    description = arch.describe(config.arch, config.image_size)
    method = method_class(config.method)(arch.create(description), config)
    views, per_caption = method.views(config), planned.rows_per_unit
    memory = plan.usable_memory(device, ranks_here, sum(p.numel() for p in method.parameters()))
    unit = per_caption if method.reads_text else 1
    micro = plan.micro_batch(config, rows, unit, plan.activation_bytes(config, method.passes(config)), memory)
    flops = training_flops(method, blank(unit, views, method.shuffles), _tokens(method, config, [""])) / unit
    engine = make_engine(config, method, micro, 1 if config.reproducible else rows // micro, device.type == "cuda")
    step_of = Step(engine, config.seed, micro, per_caption, bool(config.reproducible), config.optim.clip)

    control = dist.Control(collective_timeout(config.hang_timeout_s))
    saver = checkpoint.Saver(run, config.keep_every, control, events)
    clock = time.monotonic()
    state = checkpoint.load_newest(run, engine)
    start, skipped = int(state["step"]), int(state.get("skipped", 0))
    restore_s = round(time.monotonic() - clock, 3)
    name, peak = peak_flops(device)
    events.write("resumed" if start else "began", step=start, steps=steps, restore_s=restore_s, micro_batch=micro, device=name)
    metrics = Metrics(run, config.wandb) if rank == 0 else None

    loader = batches(
        index, planned.order, views, seed=config.seed, first=start, last=steps, rank=rank, world=world,
        workers=config.workers, device=device, max_broken=config.max_broken,
        on_broken=lambda name, why: events.write("replaced", what=name, why=why), texts=method.reads_text,
        shuffles=method.shuffles,
    )  # fmt: skip
    done, since, waited, stalled, replaced, counted = start, time.monotonic(), 0.0, 0.0, 0, start
    for wait_s, batch in _timed(loader):
        begin = time.monotonic()
        rate = learning_rate(batch.step, steps, planned.warmup, planned.peak_lr)
        set_rates(engine, rate, weight_decay(batch.step, steps, config.optim.weight_decay, config.optim.weight_decay_end))
        method.before_step(batch.step, steps, batch.step / planned.order.steps_per_epoch)
        tokens = _tokens(method, config, batch.texts[::per_caption])
        loss, parts = step_of(batch.step, batch.views, None if tokens is None else tokens.to(device), batch.ids)
        done, waited, replaced = batch.step + 1, waited + wait_s, replaced + batch.replaced
        method.after_step(done, steps)
        skipped = 0 if engine.was_step_applied() else skipped + 1
        if skipped >= NONFINITE_LIMIT:
            raise WorkError(
                f"the gradients were not finite for {skipped} steps in a row (step {done}, loss {float(loss):g}): lower "
                "--optim.lr or set --optim.clip, and start from an older checkpoint or anew"
            )
        if batch.step == start and rank == 0:
            events.write("first step", step=done)
        watchdog.beat()

        if done % config.log_every == 0 or done == steps:
            mean = float(loss) if config.reproducible else dist.mean_over_ranks(loss)
            seconds = time.monotonic() - since
            if metrics is not None:
                speed = (done - counted) * config.global_batch / seconds
                metrics.write({
                    "step": done, "loss": mean, "lr": rate,
                    "epoch": done / planned.order.steps_per_epoch, "images_per_s": speed,
                    "mfu": flops * speed / (world * peak) if peak else None, "seconds": seconds, "steps": done - counted,
                    "data_wait_s": waited, "stall_s": stalled, "grad_norm": _number(engine.get_global_grad_norm()),
                    "loss_scale": float(engine.optimizer.loss_scale), "skipped": engine.skipped_steps,
                    "ids": batch.digest, "replaced": replaced, "life": life, **{k: float(v) for k, v in parts.items()},
                }, steps)  # fmt: skip
            since, waited, stalled, counted = time.monotonic(), 0.0, 0.0, done

        # What the ranks agree on was posted at the step before: no device waits for it.
        stopping, failed, settled = control.exchange([int(stop.requested is not None), *saver.progress()])
        saver.poll(failed, settled)
        due = done % config.checkpoint_every == 0 and not skipped  # a state that may be broken replaces no sound one
        if due or stopping or done == steps:
            stalled += saver.save(engine, done, {"skipped": skipped})
        if saver.seconds is not None:  # the stop is agreed on a step later, and then saved
            stop.save_s = saver.seconds + 2 * (time.monotonic() - begin)
        if stopping and done < steps:
            break

    control.collect()
    saver.close()
    if metrics is not None:
        metrics.close()
    if done < steps:
        events.write("stopped", step=done, signal=stop.requested)
        return "stopped"
    save_final(run, description, method)
    if rank == 0:
        events.write("completed", step=steps)
    return "done"


def save_final(run: Path, description: dict[str, Any], method: Any) -> None:
    """Write RUN/final from the float32 weights: the encoder, and the image-text part where there is one. Collective."""
    image_text = getattr(method, "image_text", None)
    parts = {"image_text": image_text, "encoder": method.encoder}
    if image_text is not None:
        description = {**description, "image_text": image_text.description}
    whole = {
        part: {name: full_parameter(p).cpu() for name, p in module.named_parameters()}
        for part, module in parts.items()
        if module
    }
    problem = None
    if dist.rank() == 0:
        try:
            arch.save_final(run / "final", description, whole)
        except OSError as error:
            problem = f"cannot write {run}/final: {error.strerror}; make room and give the same command again"
    problem = dist.broadcast(problem)
    if problem:
        raise WorkError(problem)


def _device() -> torch.device:
    import torch.distributed as td

    on_gpu = td.is_initialized() and td.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _tokens(method: Any, config: TrainConfig, texts: list[str]) -> torch.Tensor | None:
    return tokenize(texts, config.text.context) if method.reads_text else None


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


T = TypeVar("T")


def _timed(items: Iterable[T]) -> Iterator[tuple[float, T]]:
    """Each item with the seconds that we waited for it."""
    iterator = iter(items)
    while True:
        clock = time.monotonic()
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield time.monotonic() - clock, item
