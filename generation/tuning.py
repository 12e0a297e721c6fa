"""What `auto` stands for on a device: the attention kernel, the images a batch, whether the UNet is compiled.

The first worker on a kind of device measures and writes RUN/tuning/DEVICE.json; the others there take what it says. Each of the
three changes the last bits of pixels, so every shard's sidecar names them, and an image is made again with those.
"""

import json
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from generation.settings import GenerateConfig
from generation.triage import Kind, kind_of
from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import read_json, write_atomic

if TYPE_CHECKING:
    from generation.pipeline import TextToImage

CPU_BATCH = 16  # what `auto` is on a CPU, whose memory is no bound; larger ones are a few per cent faster at most
SIZES = (1, 4, 8, 16, 24, 32, 48, 64, 96, 128)
FASTER = 1.02  # a larger batch that gains less than this only pads more
MEMORY = 0.9  # of the device's, the rest is for fragments
PROBE_S = 2.0  # of calls of the UNet, for each kernel and size
WARM_UP_S = 120.0  # to compile a UNet of Stable Diffusion's size, roughly
GAIN = 0.2  # of the time of an image, what compiling saves there (1.60 s -> 1.35 s published for an A100)
PAYS = 2.0  # times the warm-up that compiling has to save before it is tried


@dataclass(frozen=True)
class Tuning:
    """The three settings, decided."""

    attention: str
    batch_size: int
    compile: bool


def default_tuning(config: GenerateConfig) -> Tuning:
    """What needs no measurement: the values that are given, and the plainest for `auto`."""
    attention = "sdpa" if config.attention == "auto" else config.attention
    batch_size = config.batch_size if isinstance(config.batch_size, int) else CPU_BATCH
    return Tuning(attention, batch_size, config.compile == "on")


def agree(run: Path, model: "TextToImage", images: int) -> Tuning:
    """The tuning of this kind of device in this run, measured now where nobody did: the first that writes it decides.

    `images` is how many this worker may expect to make.
    """
    config, file = model.config, _file(run, model)
    if model.device.type == "cpu" or "auto" not in (config.attention, config.batch_size, config.compile):
        return _read(file) or default_tuning(config)  # a smaller batch after a lack of memory is remembered on a CPU as well
    if known := _read(file):
        return known
    tuning, measured = measure(model, images)
    temporary = file.with_name(f".{file.name}.{os.uname().nodename}.{os.getpid()}")
    write_atomic(temporary, json.dumps({**asdict(tuning), "measured": measured}, indent=1) + "\n")
    try:
        os.link(temporary, file)  # where it exists, another was faster
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
    return _read(file) or tuning


def step_down(run: Path, model: "TextToImage") -> Tuning | None:
    """After a lack of memory: half of the batch, for this kind of device from now on; None where the batch is fixed or one."""
    now = model.tuning
    if model.config.batch_size != "auto" or now.batch_size == 1:
        return None
    known = _read(_file(run, model)) or now
    smaller = replace(now, batch_size=min(known.batch_size, now.batch_size // 2))
    write_atomic(_file(run, model), json.dumps({**asdict(smaller), "measured": {"out of memory at": now.batch_size}}) + "\n")
    return smaller


def measure(model: "TextToImage", images: int) -> tuple[Tuning, dict[str, Any]]:
    """Measure on the model's device what is `auto`, and leave the model set so; the tuning, and what it rests on.

    Raises UsageError where a kernel that was asked for does not run.
    """
    config, tuning = model.config, default_tuning(model.config)
    seconds: dict[str, float] = {}  # an image and step
    measured: dict[str, Any] = {"seconds an image and step": seconds}
    if config.attention == "auto":
        for name in ("sdpa", "xformers"):
            try:
                model.use(replace(tuning, attention=name, batch_size=min(4, tuning.batch_size), compile=False))
                seconds[name] = _seconds_an_image(model)
            except UsageError:
                continue  # no wheel, no kernel for this card
        tuning = replace(tuning, attention=min(seconds, key=lambda name: seconds[name]))
    if config.batch_size == "auto":

        def seconds_at(size: int) -> float | None:
            try:
                model.use(replace(tuning, batch_size=size, compile=False))
                return _seconds_an_image(model) if model.memory_used() < MEMORY else None
            except Exception as error:
                if kind_of(error) is not Kind.OOM:
                    raise
                return None

        tuning = replace(tuning, batch_size=largest(seconds_at, config.images_per_caption * config.captions_per_shard))
    if config.compile == "auto":
        model.use(tuning)
        eager = _seconds_an_image(model)
        seconds["eager"] = eager
        if eager * config.steps * GAIN * images > PAYS * WARM_UP_S:
            try:
                model.use(replace(tuning, compile=True))
                seconds["compiled"] = _seconds_an_image(model)
            except Exception as error:  # no compiler, an operation it does not know, no memory for graphs
                if kind_of(error) is Kind.GPU:
                    raise
                measured["not compiled"] = f"{type(error).__name__}: {error}".splitlines()[0]
            tuning = replace(tuning, compile=seconds.get("compiled", eager) < eager)
    model.use(tuning)
    return tuning, measured


def largest(seconds_at: Callable[[int], float | None], images: int) -> int:
    """The batch size for shards of `images`: the largest that fits and is still faster an image, cut down to where the last
    batch of a shard is as full as the others. `seconds_at(size)` is None where the size does not fit."""
    best, time_best = SIZES[0], float("inf")
    for size in SIZES:
        seconds = seconds_at(size)
        if seconds is None or seconds * FASTER > time_best:
            break
        best, time_best = size, seconds
    batches = -(-images // best)
    return -(-images // batches)


def _seconds_an_image(model: "TextToImage") -> float:
    """Median seconds of a call of the UNet, guidance included, over its images; the first calls warm up."""
    times: list[float] = []
    while len(times) < 4 or (sum(times) < PROBE_S and len(times) < 30):
        start = time.perf_counter()
        model.probe(decode=not times)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:]) / model.tuning.batch_size


def _file(run: Path, model: "TextToImage") -> Path:
    return run / "tuning" / f"{re.sub(r'[^A-Za-z0-9]+', '-', model.device_name)}.json"


def _read(file: Path) -> Tuning | None:
    if not file.exists():
        return None
    found = read_json(file)
    return Tuning(found["attention"], found["batch_size"], found["compile"])
