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


def stored_images(run: Path, plan: "Plan", row: int) -> list[bytes]:
    """JPEGs of the caption in this row of captions.parquet, as its shard holds them. Raises UsageError where it is not made."""
    from generation.captions import read_captions
    from stablerep.data.shards import captions_of, need_sidecar, shard_name

    ((id, _),) = read_captions(run / "captions.parquet", row, 1)
    tar = run / "shards" / f"{shard_name(row // plan.captions_per_shard)}.tar"
    places = {caption: images for caption, _, images in captions_of(need_sidecar(tar))}
    with open(tar, "rb") as file:
        return [_cut(file, *place) for place in places[id]]


def remake(model: "TextToImage", captions: list[tuple[str, str]]) -> list[list[bytes]]:
    """JPEGs of every image of every (id, text), made again."""
    from generation.pipeline import generate_captions

    made = generate_captions(model, captions)
    assert made is not None  # nothing stops it
    return made


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
    from pyarrow import compute, parquet

    from generation.captions import read_captions
    from generation.plan import load_plan

    plan = load_plan(run)
    row = compute.index(parquet.read_table(run / "captions.parquet", columns=["id"])["id"], id).as_py()
    if row < 0:
        raise UsageError(f"{run} has no caption with the id {id}")
    if number >= plan.images_per_caption:
        raise UsageError(f"{run} has {plan.images_per_caption} images a caption: there is no number {number}")
    stored = stored_images(run, plan, row)[number]
    check_device(config.device)
    from generation.pipeline import load

    made = remake(load(run, config.device), read_captions(run / "captions.parquet", row, 1))[0][number]
    if made == stored:
        print(f"{id}.{number}: equal, {len(stored)} bytes")
        return 0
    print(f"{id}.{number}: different; {difference(made, stored)}")
    return 1


def _cut(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


if __name__ == "__main__":
    run_command(main)
