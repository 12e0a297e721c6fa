"""Measure how fast a pipeline is on this device, with the calls that a worker makes."""

import itertools
import platform
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from generation.cost import settings_of
from generation.identity import caption_id
from generation.settings import model_name

if TYPE_CHECKING:
    from generation.pipeline import TextToImage

LONGEST_S = 60.0  # of measuring; a second batch is waited for only where it ends within
STEADY = 0.02  # the standard error of the time of a batch, over its mean, at which more batches tell nothing


def measure(model: "TextToImage", load_s: float, longest_s: float = LONGEST_S) -> dict[str, Any]:
    """An entry of a calibration file: images/s of full batches of a pipeline that took `load_s` to load, after one step to
    warm up.

    Whole shards of made-up captions are made and thrown away until the mean time of a batch is known to 2 %, or for
    `longest_s`.
    """
    from generation.pipeline import generate_captions

    config = model.config
    texts = [f"a photo of a bag, number {k}" for k in range(config.captions_per_shard)]
    captions = [(caption_id(text), text) for text in texts]
    model.config = replace(config, steps=1, images_per_caption=1)
    generate_captions(model, captions[: model.tuning.batch_size])
    model.config = config

    marks: list[float] = []  # when each batch began

    def enough() -> bool:
        marks.append(time.perf_counter())
        return _enough(marks, longest_s)

    while generate_captions(model, captions, stopped=enough) is not None:
        pass
    batches, seconds = len(marks) - 1, marks[-1] - marks[0]
    return {
        "settings": settings_of(config),
        "device": device_name(str(model.device)),
        "date": time.strftime("%Y-%m-%d"),
        "images_per_s": batches * model.tuning.batch_size / seconds,
        "load_s": round(load_s, 2),
        "batches": batches,
        "seconds": round(seconds, 2),
        "model": model_name(config.model),
        **asdict(model.tuning),
    }


def _enough(marks: list[float], longest_s: float) -> bool:
    batches = len(marks) - 1
    if batches < 1:
        return False
    elapsed = marks[-1] - marks[0]
    if elapsed + elapsed / batches > longest_s:
        return True
    if batches < 8:
        return False
    times = [b - a for a, b in itertools.pairwise(marks)]
    return statistics.stdev(times) / batches**0.5 < STEADY * statistics.mean(times)


def device_name(device: str) -> str | None:
    """The name of a GPU as its driver says it (None where there is none), or of this machine's CPU."""
    if device != "cpu":
        import torch

        return str(torch.cuda.get_device_name(device)) if torch.cuda.is_available() else None
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
