"""What a generation costs: images/s measured here before, or published, become GPU hours, wall time and money."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from generation.settings import GenerateConfig, fingerprint, generated_size, model_name
from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import read_json, write_json

CALIBRATION = "~/.cache/stablerep-launch/calibration.json"


@dataclass(frozen=True)
class Reference:
    """A published speed of one GPU, for runs whose settings are these (with guidance, in half precision, any batch size)."""

    model: str
    device: str
    steps: int
    resolution: int
    images_per_s: float
    source: str


REFERENCES = [
    Reference(
        "stable-diffusion-v1-5",
        "A100",
        50,
        512,
        1.25,
        "1.2 to 1.3 images/s published for an A100 at batch 64; not measured here",
    )
]


@dataclass(frozen=True)
class Speed:
    """How fast one worker is: images/s of full batches, seconds until its pipeline is loaded, and who says so."""

    images_per_s: float
    load_s: float
    source: str


@dataclass(frozen=True)
class Estimate:
    """What `plan.json` keeps. Hours are those that all workers are paid for; what nobody knows is None."""

    workers: int
    device: str | None
    hours: float | None
    wall_s: float | None
    images_per_s: float | None  # of all workers, from start to end
    money: float | None
    currency: str
    source: str


def estimate(
    config: GenerateConfig,
    captions: int,
    workers: int,
    device: str | None,
    speed: Speed | None,
    price: float | None,
    currency: str,
) -> Estimate:
    """Cost of `captions` in the shards of `config` on `workers` that take a shard each until none is left, and wait for
    the last; `price` is that of an hour of one worker. Waits in a queue and interruptions are not in it."""
    if not captions:
        return Estimate(workers, device, 0.0, 0.0, None, None, currency, "nothing is left to make")
    if speed is None:
        why = f"unknown for {device}" if device else "unknown: the cluster file does not name its device"
        measures = "--calibrate measures it" if device else "--calibrate measures and names it"
        return Estimate(workers, device, None, None, None, None, currency, f"{why}: {measures}")
    shards = -(-captions // config.captions_per_shard)
    images = min(captions, config.captions_per_shard) * config.images_per_caption
    size = config.batch_size if isinstance(config.batch_size, int) else 1  # `auto` fits the shards
    batches = -(-images // size)  # the last one of a shard is filled up
    wall_s = speed.load_s + -(-shards // workers) * batches * size / speed.images_per_s
    hours = workers * wall_s / 3600
    rate = captions * config.images_per_caption / wall_s
    return Estimate(workers, device, hours, wall_s, rate, None if price is None else price * hours, currency, speed.source)


def speed_of(config: GenerateConfig, device: str | None, calibration: Path) -> Speed | None:
    """The newest calibration with this model on this device at these settings, else a published speed, else None.

    `device` is a name or a word of it ("A100" for "NVIDIA A100-SXM4-80GB"). The model may be a hub id that is not here: no
    calibration is then found.
    """
    if device is None:
        return None
    if (Path(config.model) / "model_index.json").exists():
        wanted = settings_of(config)
        for entry in reversed(read_calibration(calibration)):
            if entry["settings"] == wanted and _names(device, entry["device"]):
                source = f"measured on {entry['device']} on {entry['date']}"
                return Speed(entry["images_per_s"], entry["load_s"], source)
    if config.dtype not in ("fp16", "bf16") or config.guidance_scale == 1:
        return None
    for known in REFERENCES:
        if model_name(config.model).rpartition("/")[2] != known.model or not _names(known.device, device):
            continue
        if config.steps == known.steps and generated_size(config) == known.resolution:
            return Speed(known.images_per_s, 0.0, known.source)
    return None


def settings_of(config: GenerateConfig) -> dict[str, Any]:
    """What decides the speed on a device, of a config whose model is a folder; two equal ones share a calibration."""
    return {
        "model": fingerprint(Path(config.model)),
        "dtype": config.dtype,
        "steps": config.steps,
        "guided": config.guidance_scale != 1,
        "batch_size": config.batch_size,
        "compile": config.compile,
        "resolution": generated_size(config),
    }


def read_calibration(path: Path) -> list[dict[str, Any]]:
    """The entries of a calibration file, the newest last; none where there is no file. Raises UsageError on another file."""
    path = path.expanduser()
    try:
        entries = read_json(path) if path.exists() else []
        if all({"settings", "device", "date", "images_per_s", "load_s"} <= set(entry) for entry in entries):
            return list(entries)
    except (ValueError, TypeError):
        pass
    raise UsageError(f"{path} is not a file that --calibrate wrote: give another --calibration, or remove it")


def store(path: Path, entry: dict[str, Any]) -> None:
    """Add an entry to a calibration file; an older one of the same device and settings goes."""
    same = ("settings", "device")
    kept = [old for old in read_calibration(path) if any(old[k] != entry[k] for k in same)]
    write_json(path.expanduser(), [*kept, entry])


def _names(word: str, device: str) -> bool:
    """Whether `word` is the device's name or whole words of it: A10 does not name an A100."""
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", device, re.IGNORECASE) is not None
