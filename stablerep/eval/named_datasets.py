"""The data sets of the paper's tables, in the layout that torchvision expects below `--data-root`. Metrics and splits are
those of Kornblith et al. (arXiv 1805.08974, appendix A.1), which SimCLR (arXiv 2002.05709) and StableRep follow."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stablerep.eval.datasets import MEAN_AP, PER_CLASS, TOP_1, Dataset, Files, Labelled
from stablerep.runtime.errors import UsageError

Split = tuple[list[Any], Any]  # paths (or pictures) and labels
Splits = dict[str, Split]
CALTECH_TRAIN = 30  # pictures a class
VOC_CLASSES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]  # fmt: skip


@dataclass(frozen=True)
class Named:
    """How a set is read and scored, where it lies below the root, and where it comes from."""

    splits: Callable[[Path], tuple[Splits, list[str]]]
    place: str
    url: str
    metric: str = TOP_1
    margin: float = 1.0


def read(name: str, size: int, root: Path) -> Dataset:
    """The set `name` below `root`. Raises UsageError: what to download, and where to put it."""
    named = SETS[name]
    try:
        splits, classes = named.splits(root)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise missing(name, root, f"cannot be read ({str(error).splitlines()[0]})") from None

    def labelled(split: str) -> Labelled:
        items, labels = splits[split]
        if items and not isinstance(items[0], np.ndarray):
            items = [str(Path(item).relative_to(root)) for item in items]
        return Labelled(Files(items, size, str(root), named.margin), np.asarray(labels, np.int64))

    val = labelled("val") if "val" in splits else None
    return Dataset(name, labelled("train"), labelled("test"), val, classes, named.metric)


def missing(name: str, root: Path, why: str) -> UsageError:
    """What to download, and where to put it."""
    named = SETS[name]
    return UsageError(
        f"--dataset {name}: {root / named.place} {why}; download {named.url} and unpack it there (--data-root is {root})"
    )


def _imagenet(root: Path) -> tuple[Splits, list[str]]:
    """Train, and the 50,000 of val as test; ROOT/imagenet holds the archives or, once unpacked, train/ and val/."""
    from torchvision.datasets import ImageNet

    train, test = (ImageNet(str(root / "imagenet"), split) for split in ("train", "val"))
    return {part: (*_columns(data.samples),) for part, data in (("train", train), ("test", test))}, [
        names[0] for names in train.classes
    ]


def _columns(samples: list[tuple[str, int]]) -> Split:
    return [path for path, _ in samples], [label for _, label in samples]


def _cifar(name: str) -> Callable[[Path], tuple[Splits, list[str]]]:
    def splits(root: Path) -> tuple[Splits, list[str]]:
        from torchvision import datasets

        train, test = (getattr(datasets, name)(str(root), train=part) for part in (True, False))
        return {"train": (list(train.data), train.targets), "test": (list(test.data), test.targets)}, train.classes

    return splits


def _official(name: str, files: str, *parts: str) -> Callable[[Path], tuple[Splits, list[str]]]:
    """A torchvision class whose splits are called `parts`, the last of them the test split; `files` is its list of paths."""

    def splits(root: Path) -> tuple[Splits, list[str]]:
        from torchvision import datasets

        found: Splits = {}
        for part in parts:
            data = getattr(datasets, name)(str(root), split=part)
            found["train" if part == "trainval" else part] = (getattr(data, files), data._labels)
        return found, getattr(data, "classes", [])

    return splits


def _flowers(root: Path) -> tuple[Splits, list[str]]:
    """Train 1,020, val 1,020, test 6,149."""
    splits, _ = _official("Flowers102", "_image_files", "train", "val", "test")(root)
    from torchvision.datasets import Flowers102

    return splits, list(Flowers102.classes)


def _cars(root: Path) -> tuple[Splits, list[str]]:
    from torchvision.datasets import StanfordCars

    train, test = (StanfordCars(str(root), split) for split in ("train", "test"))
    return {"train": _columns(train._samples), "test": _columns(test._samples)}, train.classes


def _sun397(root: Path) -> tuple[Splits, list[str]]:
    """The first of the ten official partitions (Training_01.txt, Testing_01.txt: 50 + 50 a class), as Kornblith et al. take;
    the two lists come apart from the pictures."""
    folder = root / "SUN397"
    classes = [line[3:].strip() for line in (folder / "ClassName.txt").read_text().splitlines() if line.strip()]
    number = {name: i for i, name in enumerate(classes)}
    splits: Splits = {}
    for part, listing in (("train", "Training_01.txt"), ("test", "Testing_01.txt")):
        lines = [line.strip().lstrip("/") for line in (folder / listing).read_text().splitlines() if line.strip()]
        labels = [number["/".join(line.split("/")[1:-1])] for line in lines]  # a/abbey/sun_x.jpg -> abbey
        splits[part] = [folder / line for line in lines], labels
    return splits, classes


def _caltech101(root: Path) -> tuple[Splits, list[str]]:
    """30 pictures a class to train, all others to test, as Kornblith et al. take; drawn once with seed 0, since no split is
    official. 101 objects and, as they count it, the background as 102nd class."""
    folder = root / "caltech101" / "101_ObjectCategories"
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
    random = np.random.default_rng(0)
    splits: Splits = {"train": ([], []), "test": ([], [])}
    for label, name in enumerate(classes):
        files = sorted((folder / name).glob("*.jpg"))
        order = random.permutation(len(files))
        for part, rows in (("train", order[:CALTECH_TRAIN]), ("test", order[CALTECH_TRAIN:])):
            splits[part][0].extend(files[i] for i in sorted(rows))
            splits[part][1].extend([label] * len(rows))
    return splits, classes


def _voc2007(root: Path) -> tuple[Splits, list[str]]:
    """Several classes a picture: 1 where an object of it is there that is not marked difficult."""
    from xml.etree import ElementTree

    from torchvision.datasets import VOCDetection

    splits: Splits = {}
    for part in ("train", "val", "test"):
        data = VOCDetection(str(root), year="2007", image_set=part)
        labels = np.zeros((len(data), len(VOC_CLASSES)), np.int64)
        for row, path in enumerate(data.annotations):
            for thing in ElementTree.parse(path).getroot().iter("object"):
                if thing.findtext("difficult") != "1":
                    labels[row, VOC_CLASSES.index(str(thing.findtext("name")))] = 1
        splits[part] = data.images, labels
    return splits, VOC_CLASSES


OXFORD, TORONTO = "https://www.robots.ox.ac.uk/~vgg/data", "https://www.cs.toronto.edu/~kriz"
SETS = {
    "imagenet": Named(
        _imagenet, "imagenet", "ILSVRC2012_devkit_t12.tar.gz, _img_train.tar, _img_val.tar of "
        "https://image-net.org/challenges/LSVRC/2012", margin=256 / 224
    ),
    "cifar10": Named(_cifar("CIFAR10"), "cifar-10-batches-py", f"{TORONTO}/cifar-10-python.tar.gz"),
    "cifar100": Named(_cifar("CIFAR100"), "cifar-100-python", f"{TORONTO}/cifar-100-python.tar.gz"),
    "aircraft": Named(
        _official("FGVCAircraft", "_image_files", "train", "val", "test"), "fgvc-aircraft-2013b",
        f"{OXFORD}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz", PER_CLASS
    ),
    "cars": Named(_cars, "stanford_cars", "https://github.com/pytorch/vision/issues/7545 (says where it is to be had)"),
    "dtd": Named(
        _official("DTD", "_image_files", "train", "val", "test"), "dtd/dtd", f"{OXFORD}/dtd/download/dtd-r1.0.1.tar.gz"
    ),
    "flowers": Named(
        _flowers, "flowers-102", f"102flowers.tgz (as jpg/), imagelabels.mat and setid.mat of {OXFORD}/flowers/102", PER_CLASS
    ),
    "pets": Named(
        _official("OxfordIIITPet", "_images", "trainval", "test"), "oxford-iiit-pet",
        f"images.tar.gz and annotations.tar.gz of {OXFORD}/pets/data", PER_CLASS
    ),
    "sun397": Named(
        _sun397, "SUN397", "http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz and, into SUN397/, "
        "https://vision.princeton.edu/projects/2010/SUN/download/Partitions.zip"
    ),
    "caltech101": Named(
        _caltech101, "caltech101/101_ObjectCategories",
        "https://data.caltech.edu/records/mzrjq-6wc02 (101_ObjectCategories.tar.gz)", PER_CLASS
    ),
    "food101": Named(
        _official("Food101", "_image_files", "train", "test"), "food-101", "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz"
    ),
    "voc2007": Named(
        _voc2007, "VOCdevkit/VOC2007", "VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar of "
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2007", MEAN_AP
    ),
}  # fmt: skip
