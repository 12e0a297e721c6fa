"""Pictures and captions for the embedded pipeline: Fashion-MNIST, tinted.

    python generation/tiny/data.py --source FOLDER      (the Debian package dataset-fashion-mnist, unpacked)

writes assets/fashion/ (the labelled real pictures of the probe, which no generator trains on) and assets/captions.txt.
Source: Xiao, Rasul, Vollgraf, "Fashion-MNIST" (arXiv 1708.07747), MIT licence.
"""

import gzip
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

from stablerep.runtime.config import key, parse, run_command
from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import REPO, write_atomic, write_json

CLASSES = ["T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
COLOURS = {
    "black": (0.08, 0.08, 0.08),
    "red": (0.86, 0.12, 0.12),
    "orange": (0.98, 0.52, 0.05),
    "green": (0.10, 0.58, 0.24),
    "blue": (0.12, 0.34, 0.86),
    "purple": (0.50, 0.18, 0.68),
    "pink": (0.96, 0.38, 0.64),
    "brown": (0.48, 0.28, 0.12),
}
TEMPLATES = ["a photo of {a} {x}", "{a} {x}", "{a} {x} on a white background", "a shop picture of {a} {x}"]
PROBE_PER_CLASS = 200


@dataclass
class DataConfig:
    """Where Fashion-MNIST lies."""

    source: str = key("", "folder with the four Fashion-MNIST .gz files (searched below it)")


def caption(colour: int, label: int, template: int) -> str:
    """The caption of a tinted picture."""
    thing = f"{list(COLOURS)[colour]} {CLASSES[label]}"
    article = "a pair of" if CLASSES[label] == "trousers" else "an" if thing[0] in "aeiou" else "a"
    return TEMPLATES[template].format(a=article, x=thing)


def tint(grey: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Ink pictures on white paper: uint8 [N, 28, 28] and colour index [N] -> float32 [N, 3, 32, 32] in [-1, 1]."""
    ink = np.pad(grey.astype(np.float32) / 255, ((0, 0), (2, 2), (2, 2)))
    rgb = np.array(list(COLOURS.values()), dtype=np.float32)[colour]
    return 1 - 2 * ink[:, None] * (1 - rgb[:, :, None, None])


def load(source: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """One official split, `train` or `t10k`: pictures uint8 [N, 28, 28] and labels uint8 [N]."""
    arrays = []
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        found = sorted(source.rglob(f"{part}-{kind}-ubyte.gz"))
        if not found:
            raise UsageError(f"no {part}-{kind}-ubyte.gz below {source}: unpack Debian's dataset-fashion-mnist there")
        arrays.append(np.frombuffer(gzip.decompress(found[0].read_bytes())[header:], dtype=np.uint8))
    return arrays[0].reshape(-1, 28, 28), arrays[1]


def split(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Indices of `per_class` pictures of every class, shuffled; a pure function of its arguments."""
    random = np.random.default_rng(seed)
    chosen = [random.permutation(np.flatnonzero(labels == c))[:per_class] for c in range(len(CLASSES))]
    return random.permutation(np.concatenate(chosen))


def generator_part(source: Path) -> tuple[np.ndarray, np.ndarray]:
    """The official training pictures that the probe does not use."""
    pictures, labels = load(source, "train")
    rest = np.setdiff1d(np.arange(len(labels)), split(labels, PROBE_PER_CLASS, 0))
    return pictures[rest], labels[rest]


def main(argv: list[str]) -> int:
    """Write the probe's pictures and the caption list."""
    config = parse(DataConfig, argv, prog="data.py", about="Make assets/fashion and assets/captions.txt.")
    folder = REPO / "assets" / "fashion"
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for name, part in (("train", "train"), ("test", "t10k")):
        pictures, labels = load(Path(config.source), part)
        chosen = split(labels, PROBE_PER_CLASS, 0)
        arrays[f"{name}_images"], arrays[f"{name}_labels"] = pictures[chosen], labels[chosen]
    np.savez_compressed(folder / "fashion.npz", **arrays)
    write_json(folder / "classes.json", CLASSES)
    lines = [
        caption(colour, label, t)
        for t in range(len(TEMPLATES))
        for label in range(len(CLASSES))
        for colour in range(len(COLOURS))
    ]
    write_atomic(REPO / "assets" / "captions.txt", "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)
