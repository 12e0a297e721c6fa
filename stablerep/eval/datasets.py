"""Labelled real pictures by name or folder. The bundled subset of Fashion-MNIST lies in memory; all others are read from
their files when they are needed."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from stablerep.runtime.errors import UsageError, WorkError
from stablerep.runtime.rundir import data_folder

TOP_1, PER_CLASS, MEAN_AP = "top-1", "mean per class", "11-point mAP"
BUNDLED = ("fashion", "fashion-probe")
UNCOMPRESSED = (".bmp", ".pgm", ".ppm", ".tif", ".tiff")
PROBE_PER_CLASS = 50  # `fashion-probe` trains on the last of each class: the 150 before them may train encoders


class Files:
    """Pictures in files (or arrays [H, W, 3]), decoded when they are asked for: `files[i]` is uint8 [3, S, S], `files[rows]`
    [N, 3, S, S]. The shorter side is resized to `size * margin` (bicubic), the centre cut out."""

    def __init__(self, items: Sequence[Any], size: int, root: str = "", margin: float = 1.0) -> None:
        self.items, self.size, self.root, self.margin = items, size, root, margin

    def __len__(self) -> int:
        return len(self.items)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As of the array of all pictures."""
        return len(self.items), 3, self.size, self.size

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, int | np.integer):
            return self._centre(self.open(int(rows)))
        chosen = np.arange(len(self))[rows]
        pictures = [self._centre(self.open(int(i))) for i in chosen]
        return np.stack(pictures) if pictures else np.zeros((0, 3, self.size, self.size), np.uint8)

    def open(self, row: int) -> Any:
        """The whole picture (PIL, RGB). Raises WorkError where its file is no sound picture."""
        from PIL import Image

        item = self.items[row]
        if isinstance(item, np.ndarray):
            return Image.fromarray(item)
        path = Path(self.root) / item
        try:
            return Image.open(path).convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise WorkError(f"{path} is not a sound picture ({str(error).splitlines()[0]}): fetch it again") from None

    def _centre(self, picture: Any) -> np.ndarray:
        from torchvision.transforms import InterpolationMode, functional

        resized = functional.resize(picture, [round(self.size * self.margin)], InterpolationMode.BICUBIC)
        return np.array(functional.center_crop(resized, [self.size, self.size])).transpose(2, 0, 1)

    def digest(self) -> str:
        """SHA-256 that tells pictures apart: of the arrays, or of the files' names and sizes (to read a large set only for
        its hash would take as long as to use it), and of their bytes where they are not compressed, so that all are of one
        size; and of how they are cut out."""
        digest = hashlib.sha256(f"{self.size} {self.margin}".encode())
        for item in self.items:
            if isinstance(item, np.ndarray):
                digest.update(item.tobytes())
            else:
                path = Path(self.root) / item
                digest.update(f"{item} {path.stat().st_size}\n".encode())
                if path.suffix.lower() in UNCOMPRESSED:
                    digest.update(path.read_bytes())
        return digest.hexdigest()


@dataclass
class Labelled:
    """A split: pictures uint8 [N, 3, S, S] (an array, or `Files`, which is indexed like one); labels int64 [N], or [N, C] of
    0 and 1 where a picture shows several classes."""

    pictures: Any
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> "Labelled":
        """The pictures at `rows` alone; files stay unread."""
        if isinstance(self.pictures, Files):
            files = self.pictures
            chosen = Files([files.items[int(i)] for i in rows], files.size, files.root, files.margin)
            return Labelled(chosen, self.labels[rows])
        return Labelled(self.pictures[rows], self.labels[rows])

    @cached_property
    def sha256(self) -> str:
        """Of the pictures (`Files.digest`)."""
        if isinstance(self.pictures, Files):
            return self.pictures.digest()
        return hashlib.sha256(str(self.pictures.shape).encode() + np.ascontiguousarray(self.pictures).tobytes()).hexdigest()


@dataclass
class Dataset:
    """A data set: `val` is the official validation split where there is one; `classes` in the order of the labels."""

    name: str
    train: Labelled
    test: Labelled
    val: Labelled | None
    classes: list[str]
    metric: str = TOP_1

    @property
    def splits(self) -> dict[str, Labelled]:
        """The splits that exist, by name."""
        found = {"train": self.train, "val": self.val, "test": self.test}
        return {name: split for name, split in found.items() if split is not None}

    @cached_property
    def sha256(self) -> str:
        """Of all splits, pictures and labels: what a number was measured on."""
        digest = hashlib.sha256(self.metric.encode())
        for name, split in self.splits.items():
            digest.update(f"{name} {split.sha256} ".encode() + np.ascontiguousarray(split.labels).tobytes())
        return digest.hexdigest()


def load(name: str, size: int, root: str = "data") -> Dataset:
    """The data set `name` at `size` pixels: `fashion`, `fashion-probe`, a name of `named_datasets.SETS` below `root`, or a
    folder with train/<class>/ and test/<class>/ (and val/<class>/ if there is one).

    Raises UsageError, one line that says what is missing and where it goes.
    """
    from stablerep.eval.named_datasets import SETS, read

    check_there(name, root)
    if name in BUNDLED:
        return _fashion(name, size)
    if name in SETS:
        return read(name, size, Path(root))
    folder = Path(name)
    classes = sorted(p.name for p in (folder / "train").iterdir() if p.is_dir())
    val = _folder(folder / "val", size, classes) if (folder / "val").is_dir() else None
    return Dataset(name, _folder(folder / "train", size, classes), _folder(folder / "test", size, classes), val, classes)


def check_there(name: str, root: str) -> None:
    """Raise UsageError where `load` would find nothing: a glance, before a job is submitted."""
    from stablerep.eval.named_datasets import SETS, missing

    if name in SETS:
        if not (Path(root) / SETS[name].place).exists():
            raise missing(name, Path(root), "is not there")
    elif name not in BUNDLED and not ((Path(name) / "train").is_dir() and (Path(name) / "test").is_dir()):
        known = ", ".join([*BUNDLED, *SETS])
        raise UsageError(f"--dataset {name}: neither one of {known} nor a folder with train/<class>/ and test/<class>/")


def _fashion(name: str, size: int) -> Dataset:
    """200 + 200 pictures a class of Fashion-MNIST (MIT; arXiv 1708.07747), dark on white as the generator's are."""
    folder = data_folder("assets") / "fashion"
    arrays = np.load(folder / "fashion.npz")

    def split(part: str) -> Labelled:
        ink = np.pad(arrays[f"{part}_images"], ((0, 0), (2, 2), (2, 2)))
        pictures = np.repeat((255 - ink)[:, None], 3, axis=1)
        return Labelled(_resize(pictures, size), arrays[f"{part}_labels"].astype(np.int64))

    train = split("train")
    if name == "fashion-probe":
        rows = [np.flatnonzero(train.labels == c)[-PROBE_PER_CLASS:] for c in np.unique(train.labels)]
        kept = np.sort(np.concatenate(rows))
        train = Labelled(train.pictures[kept], train.labels[kept])
    return Dataset(name, train, split("test"), None, json.loads((folder / "classes.json").read_text()))


def _resize(pictures: np.ndarray, size: int) -> np.ndarray:
    if pictures.shape[-1] == size:
        return pictures
    import torch

    x = torch.nn.functional.interpolate(torch.from_numpy(pictures).float(), (size, size), mode="bicubic", antialias=True)
    return x.round().clamp(0, 255).byte().numpy()


def _folder(folder: Path, size: int, classes: list[str]) -> Labelled:
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(folder))
    except OSError as error:
        raise UsageError(f"cannot read pictures of {folder}: {str(error).splitlines()[0]}") from None
    if found.classes != classes:
        strange = sorted(set(found.classes) ^ set(classes))
        raise UsageError(f"{folder} has not the classes of train: {', '.join(strange[:5])}")
    files = [str(Path(path).relative_to(folder)) for path, _ in found.samples]
    return Labelled(Files(files, size, str(folder)), np.array(found.targets, np.int64))
