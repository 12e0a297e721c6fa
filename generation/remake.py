"""Make one image again and compare it with the stored one: python -m generation.remake RUN ID J [--device cuda:0]"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if not __package__:  # run as a script: sys.path[0] is this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from stablerep.runtime.config import key, parse, run_command
from stablerep.runtime.errors import UsageError

if TYPE_CHECKING:
    from generation.pipeline import TextToImage
    from generation.plan import Plan
    from generation.tuning import Tuning


@dataclass
class RemakeConfig:
    """Which image, and where it is made."""

    image: list[str] = key([], "a run folder, a caption's id, an image's number")
    device: str = key("cpu", "bytes are equal only on the hardware that made them")


def check_device(name: str) -> None:
    """Raise UsageError where this machine has no such device."""
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} is not there: {str(error).splitlines()[0]}") from None


@dataclass(frozen=True)
class Stored:
    """A caption of a run as its shard holds it: its id and text, its JPEGs, and the tuning that they were made with."""

    caption: tuple[str, str]
    images: list[bytes]
    tuning: "Tuning"


def stored(run: Path, plan: "Plan", row: int) -> Stored:
    """The caption in this row of captions.parquet. Raises UsageError where it is not made."""
    from generation.captions import read_captions
    from generation.tuning import Tuning
    from stablerep.data.shards import captions_of, need_sidecar, shard_name

    caption = read_captions(run / "captions.parquet", row, 1)[0]
    tar = run / "shards" / f"{shard_name(row // plan.captions_per_shard)}.tar"
    sidecar = need_sidecar(tar)
    places = {id: images for id, _, images in captions_of(sidecar)}
    tuning = Tuning(sidecar["attention"], sidecar["batch_size"], sidecar["compile"])
    with open(tar, "rb") as file:
        return Stored(caption, [_cut(file, *place) for place in places[caption[0]]], tuning)


def remake(model: "TextToImage", captions: list[Stored]) -> list[list[bytes]]:
    """JPEGs of every image of captions, made again, each with its own tuning."""
    from generation.pipeline import generate_captions

    made: dict[str, list[bytes]] = {}
    for tuning in {c.tuning for c in captions}:
        if tuning != model.tuning:
            model.use(tuning)
        same = [c.caption for c in captions if c.tuning == tuning]
        images = generate_captions(model, same)
        assert images is not None  # nothing stops it
        made |= {id: jpegs for (id, _), jpegs in zip(same, images, strict=True)}
    return [made[c.caption[0]] for c in captions]


def difference(a: bytes, b: bytes) -> str:
    """How far apart two JPEGs are, in words; `b` may be broken."""
    import numpy as np
    import simplejpeg

    try:
        x, y = (simplejpeg.decode_jpeg(data).astype(int) for data in (a, b))
    except ValueError as error:
        return f"the stored one does not decode ({error})"
    if x.shape != y.shape:
        return f"{x.shape[1]} x {x.shape[0]} pixels against {y.shape[1]} x {y.shape[0]}"
    apart = np.abs(x - y)
    return f"pixels differ by {apart.mean():.2f} of 255 on average, by {apart.max()} at most"


def main(argv: list[str]) -> int:
    """0 where the bytes are equal, 1 where they are not."""
    config = parse(RemakeConfig, argv, prog="remake.py", about="Make one image of a run again.", positional="image")
    if len(config.image) != 3 or not config.image[2].isdigit():
        raise UsageError("which image? python -m generation.remake RUN ID J")
    run, id, number = Path(config.image[0]), config.image[1], int(config.image[2])
    from generation.captions import row_of
    from generation.plan import load_plan

    plan = load_plan(run)
    row = row_of(run / "captions.parquet", id)
    if row is None:
        raise UsageError(f"{run} has no caption with the id {id}")
    if number >= plan.images_per_caption:
        raise UsageError(f"{run} has {plan.images_per_caption} images a caption: there is no number {number}")
    caption = stored(run, plan, row)
    check_device(config.device)
    from generation.pipeline import load

    was, made = caption.images[number], remake(load(run, config.device), [caption])[0][number]
    if made == was:
        print(f"{id}.{number}: equal, {len(was)} bytes")
        return 0
    print(f"{id}.{number}: different; {difference(made, was)}")
    return 1


def _cut(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


if __name__ == "__main__":
    run_command(main)
