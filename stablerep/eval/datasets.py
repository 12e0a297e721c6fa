"""Labelled real pictures: the bundled Fashion-MNIST subset, or a folder FOLDER/{train,test}/<class>/*.jpg."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import data_folder


@dataclass
class Labelled:
    """A split: pictures uint8 [N, 3, S, S], labels int64 [N]."""

    pictures: np.ndarray
    labels: np.ndarray


def load(name: str, size: int) -> tuple[Labelled, Labelled, list[str]]:
    """Train split, test split and class names at `size` pixels. Raises UsageError."""
    if name == "fashion":
        return _fashion(size)
    root = Path(name)
    if not (root / "train").is_dir() or not (root / "test").is_dir():
        raise UsageError(f"--dataset {name}: neither `fashion` nor a folder with train/<class>/ and test/<class>/")
    return _folder(root / "train", size), _folder(root / "test", size), _classes(root / "train")


def _fashion(size: int) -> tuple[Labelled, Labelled, list[str]]:
    """200 + 200 pictures a class of Fashion-MNIST (MIT; arXiv 1708.07747), dark on white as the generator's are."""
    import json

    folder = data_folder("assets") / "fashion"
    arrays = np.load(folder / "fashion.npz")

    def split(part: str) -> Labelled:
        ink = np.pad(arrays[f"{part}_images"], ((0, 0), (2, 2), (2, 2)))
        pictures = np.repeat((255 - ink)[:, None], 3, axis=1)
        return Labelled(_resize(pictures, size), arrays[f"{part}_labels"].astype(np.int64))

    return split("train"), split("test"), json.loads((folder / "classes.json").read_text())


def _resize(pictures: np.ndarray, size: int) -> np.ndarray:
    if pictures.shape[-1] == size:
        return pictures
    import torch

    x = torch.nn.functional.interpolate(torch.from_numpy(pictures).float(), (size, size), mode="bicubic", antialias=True)
    return x.round().clamp(0, 255).byte().numpy()


def _classes(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir())


def _folder(folder: Path, size: int) -> Labelled:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import CenterCrop, Compose, Resize

    try:
        data = ImageFolder(str(folder), transform=Compose([Resize(size), CenterCrop(size)]))
        pictures = np.stack([np.asarray(picture.convert("RGB")).transpose(2, 0, 1) for picture, _ in data])
    except (OSError, FileNotFoundError) as error:
        raise UsageError(f"cannot read pictures of {folder}: {str(error).splitlines()[0]}") from None
    return Labelled(pictures, np.array(data.targets, dtype=np.int64))
