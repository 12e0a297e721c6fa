"""Real pictures with captions, to train on beside the generated ones: the tinted Fashion-MNIST of `assets/fashion`.

    python generation/tiny/real.py --out FOLDER

writes a tar as img2dataset does. The generator was trained on none of these pictures, and the probe `fashion-probe` uses
others: the first 150 of each class of the training split are here, the last 50 are the probe's.
"""

import io
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

from generation.identity import caption_id
from generation.tiny.data import CLASSES, COLOURS, TEMPLATES, caption, tint
from stablerep.runtime.config import key, parse, run_command
from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import data_folder, write_atomic

PER_CLASS = 150
MOST = PER_CLASS // (len(COLOURS) * len(TEMPLATES))  # pictures that each caption can have


@dataclass
class RealConfig:
    """How many."""

    out: str = key("", "folder of the tar")
    captions: int | None = key(None, "only the first N captions by id, as --limit of generate.py (default: all)")
    images_per_caption: int = key(MOST, f"pictures a caption, at most {MOST}")


def pictures_of(arrays: dict[str, np.ndarray], images_per_caption: int) -> list[tuple[str, np.ndarray]]:
    """(caption, picture float32 [3, 32, 32] in [-1, 1]) of every caption, ordered by caption id.

    The pictures of a class are dealt to its captions in the order of the bundled file.
    """
    samples = []
    for label in range(len(CLASSES)):
        rows = iter(np.flatnonzero(arrays["train_labels"] == label)[:PER_CLASS])
        for colour in range(len(COLOURS)):
            for template in range(len(TEMPLATES)):
                grey = arrays["train_images"][[next(rows) for _ in range(images_per_caption)]]
                tinted = tint(grey, np.full(len(grey), colour))
                samples += [(caption(colour, label, template), picture) for picture in tinted]
    return sorted(samples, key=lambda sample: caption_id(sample[0]))


def main(argv: list[str]) -> int:
    """Write FOLDER/000000.tar."""
    from PIL import Image

    config = parse(RealConfig, argv, prog="real.py", about="Real captioned pictures to train on.")
    if not config.out:
        raise UsageError("--out FOLDER is missing: where the tar goes to")
    if not 1 <= config.images_per_caption <= MOST or (config.captions is not None and config.captions < 1):
        raise UsageError(f"--images-per-caption must be from 1 to {MOST} and --captions at least 1")
    with np.load(data_folder("assets") / "fashion" / "fashion.npz") as arrays:
        samples = pictures_of(dict(arrays), config.images_per_caption)
    count = len(samples) if config.captions is None else config.captions * config.images_per_caption
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (text, picture) in enumerate(samples[:count]):
            jpeg = io.BytesIO()
            pixels = ((picture.transpose(1, 2, 0) + 1) * 127.5).round().astype(np.uint8)
            Image.fromarray(pixels).save(jpeg, "JPEG", quality=95)
            for ending, data in (("jpg", jpeg.getvalue()), ("txt", text.encode())):
                member = tarfile.TarInfo(f"{number:06d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    write_atomic(Path(config.out) / "000000.tar", buffer.getvalue())
    print(f"{config.out}: {min(count, len(samples))} pictures with captions")
    return 0


if __name__ == "__main__":
    run_command(main)
