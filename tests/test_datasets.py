"""Every reader of labelled pictures, on tiny folders in the layout that torchvision expects."""

import hashlib
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from stablerep.eval import named_datasets
from stablerep.eval.datasets import MEAN_AP, PER_CLASS, TOP_1, Files, load
from stablerep.runtime.errors import UsageError, WorkError


def jpeg(path, shade, size=(20, 14)):
    """A picture of one shade of grey, which says which picture it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade,) * 3).save(path, quality=95)


def lines(path, *words):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(words) + "\n")


def mat(path, **values):
    from scipy.io import savemat

    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, values)


def shades(split):
    return [int(p.mean().round()) for p in split.pictures[:]]


def make_aircraft(root):
    data = root / "fgvc-aircraft-2013b/data"
    lines(data / "variants.txt", "707-320", "A300 B4")
    for i, part in enumerate(("train", "val", "test")):
        lines(data / f"images_variant_{part}.txt", f"{i}a A300 B4", f"{i}b 707-320")
        jpeg(data / f"images/{i}a.jpg", 10 * i)
        jpeg(data / f"images/{i}b.jpg", 10 * i + 5)
    return {"train": ([0, 5], [1, 0]), "val": ([10, 15], [1, 0]), "test": ([20, 25], [1, 0])}


def make_dtd(root):
    for i, part in enumerate(("train", "val", "test")):
        lines(root / f"dtd/dtd/labels/{part}1.txt", f"zigzagged/z{i}.jpg", f"banded/b{i}.jpg")
        jpeg(root / f"dtd/dtd/images/zigzagged/z{i}.jpg", 10 * i)
        jpeg(root / f"dtd/dtd/images/banded/b{i}.jpg", 10 * i + 5)
    return {"train": ([0, 5], [1, 0]), "val": ([10, 15], [1, 0]), "test": ([20, 25], [1, 0])}


def make_cars(root):
    base = root / "stanford_cars"
    names = np.array([("00001.jpg", 2), ("00002.jpg", 1)], dtype=[("fname", "O"), ("class", "O")])
    mat(base / "devkit/cars_train_annos.mat", annotations=names)
    mat(base / "cars_test_annos_withlabels.mat", annotations=names)
    mat(base / "devkit/cars_meta.mat", class_names=np.array(["AM General", "Acura"], dtype=object))
    for i, part in enumerate(("train", "test")):
        jpeg(base / f"cars_{part}/00001.jpg", 20 * i)
        jpeg(base / f"cars_{part}/00002.jpg", 20 * i + 5)
    return {"train": ([0, 5], [1, 0]), "test": ([20, 25], [1, 0])}


def make_flowers(root):
    base = root / "flowers-102"
    for i in range(1, 7):
        jpeg(base / f"jpg/image_{i:05d}.jpg", 10 * i)
    mat(base / "imagelabels.mat", labels=np.array([1, 2, 1, 2, 102, 2]))
    mat(base / "setid.mat", trnid=np.array([5, 6]), valid=np.array([3, 4]), tstid=np.array([1, 2]))
    return {"train": ([50, 60], [101, 1]), "val": ([30, 40], [0, 1]), "test": ([10, 20], [0, 1])}


def make_pets(root):
    base = root / "oxford-iiit-pet"
    for i, part in enumerate(("trainval", "test")):
        lines(base / f"annotations/{part}.txt", f"Abyssinian_{i} 1 1 1", f"great_pyrenees_{i} 2 2 1")
        jpeg(base / f"images/Abyssinian_{i}.jpg", 20 * i)
        jpeg(base / f"images/great_pyrenees_{i}.jpg", 20 * i + 5)
    return {"train": ([0, 5], [0, 1]), "test": ([20, 25], [0, 1])}


def make_sun397(root):
    base = root / "SUN397"
    lines(base / "ClassName.txt", "/a/abbey", "/c/cabin/indoor")
    for i, part in enumerate(("Training", "Testing")):
        lines(base / f"{part}_01.txt", f"/c/cabin/indoor/sun_{i}x.jpg", f"/a/abbey/sun_{i}y.jpg")
        jpeg(base / f"c/cabin/indoor/sun_{i}x.jpg", 20 * i)
        jpeg(base / f"a/abbey/sun_{i}y.jpg", 20 * i + 5)
    return {"train": ([0, 5], [1, 0]), "test": ([20, 25], [1, 0])}


def make_food101(root):
    for i, part in enumerate(("train", "test")):
        lines(root / f"food-101/meta/{part}.json", json.dumps({"waffles": [f"waffles/{i}"], "apple_pie": [f"apple_pie/{i}"]}))
        jpeg(root / f"food-101/images/waffles/{i}.jpg", 20 * i)
        jpeg(root / f"food-101/images/apple_pie/{i}.jpg", 20 * i + 5)
    return {"train": ([0, 5], [1, 0]), "test": ([20, 25], [1, 0])}


def make_voc2007(root):
    base = root / "VOCdevkit/VOC2007"

    def thing(name, difficult):
        return f"<object><name>{name}</name><difficult>{difficult}</difficult></object>"

    for i, part in enumerate(("train", "val", "test")):
        lines(base / f"ImageSets/Main/{part}.txt", f"00000{i}")
        jpeg(base / f"JPEGImages/00000{i}.jpg", 10 * i)
        objects = thing("dog", 0) + thing("person", 0) + thing("person", 1) + thing("aeroplane", 1)
        lines(base / f"Annotations/00000{i}.xml", f"<annotation>{objects}</annotation>")
    label = [int(name in ("dog", "person")) for name in named_datasets.VOC_CLASSES]
    return {"train": ([0], [label]), "val": ([10], [label]), "test": ([20], [label])}


def make_imagenet(root):
    import torch

    base = root / "imagenet"
    for i, part in enumerate(("train", "val")):
        jpeg(base / part / "n01440764/x.JPEG", 20 * i)
        jpeg(base / part / "n01443537/y.JPEG", 20 * i + 5)
    names = {"n01440764": ("tench", "Tinca tinca"), "n01443537": ("goldfish", "Carassius auratus")}
    torch.save((names, []), base / "meta.bin")
    return {"train": ([0, 5], [0, 1]), "test": ([20, 25], [0, 1])}


MAKERS = {
    "aircraft": make_aircraft, "dtd": make_dtd, "cars": make_cars, "flowers": make_flowers, "pets": make_pets,
    "sun397": make_sun397, "food101": make_food101, "voc2007": make_voc2007, "imagenet": make_imagenet,
}  # fmt: skip


@pytest.mark.parametrize("name", MAKERS)
def test_official_splits_are_read(name, tmp_path, monkeypatch):
    expected = MAKERS[name](tmp_path)
    if name == "flowers":  # torchvision checks the MD5 sums of the real files
        from torchvision.datasets import Flowers102

        monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)
    data = load(name, 8, str(tmp_path))
    assert set(data.splits) == set(expected)
    for part, (grey, labels) in expected.items():
        split = data.splits[part]
        assert isinstance(split.pictures, Files) and split.pictures[0].shape == (3, 8, 8)
        assert np.abs(np.array(shades(split)) - grey).max() <= 2 and split.labels.tolist() == labels
    per_class = name in ("aircraft", "flowers", "pets", "caltech101")
    assert data.metric == (PER_CLASS if per_class else MEAN_AP if name == "voc2007" else TOP_1)
    assert len(data.classes) > data.train.labels.max()


@pytest.mark.parametrize(("name", "folder", "files"), [
    ("cifar10", "cifar-10-batches-py", (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")),
    ("cifar100", "cifar-100-python", ("train", "test", "meta")),
])  # fmt: skip
def test_cifar_is_read(name, folder, files, tmp_path, monkeypatch):
    from torchvision import datasets

    random = np.random.default_rng(0)
    base, key, hashes, made = tmp_path / folder, "fine_labels" if name == "cifar100" else "labels", {}, {}
    base.mkdir()
    for file in files:
        labels = random.integers(0, 10, 2).tolist()
        made[file] = {"data": random.integers(0, 256, (2, 3072), np.uint8), key: labels}
        names = {"label_names": list("abcdefghij"), "fine_label_names": list("abcdefghij")}
        (base / file).write_bytes(pickle.dumps(names if "meta" in file else made[file]))
        hashes[file] = hashlib.md5((base / file).read_bytes()).hexdigest()
    official = getattr(datasets, name.upper())  # its MD5 sums are those of the real files
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(official, attribute, [[f, hashes[f]] for f, _ in getattr(official, attribute)])
    monkeypatch.setattr(official, "meta", {**official.meta, "md5": hashes[official.meta["filename"]]})
    data = load(name, 32, str(tmp_path))
    first, last = made[files[0]], made["test" if name == "cifar100" else "test_batch"]
    assert len(data.train) == (2 if name == "cifar100" else 10) and data.classes == list("abcdefghij")
    assert np.array_equal(data.train.pictures[:2], first["data"].reshape(2, 3, 32, 32))
    assert np.array_equal(data.test.pictures[:], last["data"].reshape(2, 3, 32, 32)) and data.test.labels.tolist() == last[key]


def test_caltech101_trains_on_thirty_a_class(tmp_path):
    folder = tmp_path / "caltech101/101_ObjectCategories"
    for name, count in (("BACKGROUND_Google", 31), ("ant", 33), ("yin_yang", 30)):
        for i in range(count):
            jpeg(folder / name / f"image_{i + 1:04d}.jpg", i, (4, 4))
    data, again = (load("caltech101", 8, str(tmp_path)) for _ in range(2))
    assert np.bincount(data.train.labels).tolist() == [30, 30, 30] and np.bincount(data.test.labels).tolist() == [1, 3]
    assert not set(data.train.pictures.items) & set(data.test.pictures.items) and data.metric == PER_CLASS
    assert data.train.pictures.items == again.train.pictures.items


@pytest.mark.parametrize("name", named_datasets.SETS)
def test_a_missing_set_is_one_line_that_says_what_to_do(name, tmp_path):
    with pytest.raises(UsageError) as error:
        load(name, 8, str(tmp_path))
    said = str(error.value)
    assert "\n" not in said and "http" in said and str(tmp_path / named_datasets.SETS[name].place) in said


def test_a_set_that_is_half_there_is_one_line(tmp_path):
    make_sun397(tmp_path)
    (tmp_path / "SUN397/Testing_01.txt").unlink()
    with pytest.raises(UsageError, match=r"sun397: .*download"):
        load("sun397", 8, str(tmp_path))


def test_fashion_probe_takes_the_last_fifty_of_each_class():
    whole, probe = load("fashion", 32), load("fashion-probe", 32)
    assert len(probe.train) == 500 and len(probe.test) == 2000 and np.bincount(probe.train.labels).tolist() == [50] * 10
    for label in range(10):
        expected = whole.train.pictures[whole.train.labels == label][150:]
        assert np.array_equal(probe.train.pictures[probe.train.labels == label], expected)


def test_folders_are_read_lazily_and_told_apart(tmp_path):
    for i, part in enumerate(("train", "test")):
        for label, name in enumerate(("cat", "dog")):
            jpeg(tmp_path / part / name / "a.jpg", 20 * i + 5 * label)
    data = load(str(tmp_path), 8)
    assert data.classes == ["cat", "dog"] and data.val is None and data.train.labels.tolist() == [0, 1]
    before = data.sha256
    assert load(str(tmp_path), 8).sha256 == before != load(str(tmp_path), 12).sha256
    (tmp_path / "test/dog/a.jpg").write_bytes(b"no picture")
    broken = load(str(tmp_path), 8)  # nothing is decoded here
    assert broken.sha256 != before
    with pytest.raises(WorkError, match=r"a\.jpg is not a sound picture"):
        broken.test.pictures[:]
    jpeg(tmp_path / "test/bird/a.jpg", 1)
    with pytest.raises(UsageError, match="bird"):
        load(str(tmp_path), 8)


def test_the_centre_is_cut_out_at_the_right_scale(tmp_path):
    """Against torchvision's own pipeline: shorter side to size * margin, then the centre."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    picture = Image.fromarray(noise)
    picture.save(tmp_path / "x.png")
    files = Files(["x.png"], 28, str(tmp_path), 256 / 224)
    expected = Compose([Resize(32, InterpolationMode.BICUBIC), CenterCrop(28)])(picture)
    assert np.array_equal(files[0], np.asarray(expected).transpose(2, 0, 1))


def test_an_unknown_set_names_the_known_ones():
    with pytest.raises(UsageError, match=r"imagnet: neither one of fashion, .*voc2007 nor a folder"):
        load("imagnet", 8)
