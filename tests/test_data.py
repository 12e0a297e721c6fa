"""From sources to batches: the index, the order of data, augmentations beside torchvision's, and the loader's workers."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import REPO, wait_for
from PIL import Image
from scipy.stats import ks_2samp
from sklearn.datasets import load_sample_image

from generation.identity import caption_id
from stablerep.data import colour, colour_cpu
from stablerep.data.augment import View, draw
from stablerep.data.chance import derive, permute, uniforms
from stablerep.data.crop import NUMBERS, crop_box, crops, resize
from stablerep.data.index import Column, build_index, open_index
from stablerep.data.loader import batches, rank_rows
from stablerep.data.order import Order
from stablerep.data.shards import Sample, id_to_int, write_shard
from stablerep.data.sources import CAPTION, IMAGE, text_id
from stablerep.runtime.errors import UsageError, WorkError
from stablerep.runtime.rundir import write_json

PHOTO = load_sample_image("china.jpg")
CPU = torch.device("cpu")


def encoded(picture, form="JPEG"):
    """A picture as a file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, form, **({"quality": 95} if form == "JPEG" else {}))
    return buffer.getvalue()


def tile(number, size=40):
    """A piece of a photograph, another one for each number."""
    top, left = 7 * number % (427 - size), 13 * number % (640 - size)
    return PHOTO[top : top + size, left : left + size]


def make_run(folder, captions, images=3, a_shard=4, broken=()):
    """A complete generation run; images whose running number is in `broken` are no JPEGs."""
    numbers = iter(range(captions * images))
    samples = []
    for c in range(captions):
        files = [b"\xff\xd8 broken" if n in broken else encoded(tile(n)) for n in (next(numbers) for _ in range(images))]
        samples.append(Sample(caption_id(f"caption {c}"), f"caption {c}", files, {}))
    shards = range(0, captions, a_shard)
    for number, first in enumerate(shards):
        write_shard(folder / "shards", number, samples[first : first + a_shard], {})
    shardlist = [{"url": f"shards/{n:06d}.tar"} for n in range(len(shards))]
    write_json(folder / "dataset.json", {"images_per_caption": images, "captions": captions, "shardlist": shardlist})
    return samples


def make_tar(path, files):
    """A plain tar of {name: bytes}."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def index_of(folder, *sources):
    build_index([str(s) for s in sources], folder, lambda line: None)
    return open_index(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(samples, index) of a run of 16 captions with 3 images each."""
    folder = tmp_path_factory.mktemp("data")
    samples = make_run(folder / "run", 16)
    return samples, index_of(folder / "index", folder / "run")


# --- sources and index


def test_index_of_a_generation_run_finds_every_image_and_text(run):
    samples, index = run
    assert [index.text(c) for c in range(16)] == [s.text for s in samples]
    assert index.captions["id"].tolist() == [id_to_int(caption_id(s.text)) for s in samples]
    assert index.first.tolist() == list(range(0, 49, 3))
    assert [index.read(i) for i in range(48)] == [image for s in samples for image in s.images]
    assert index.caption_of(np.array([0, 2, 3, 47])).tolist() == [0, 0, 1, 15]
    assert (index.sources[0].captions, index.sources[0].images, index.sources[0].fewest) == (16, 48, 3)


def test_index_of_tars_as_img2dataset_writes_them(tmp_path):
    files = {}
    for n in range(6):
        files[f"{n:09d}.jpg"] = encoded(tile(n))
        files[f"{n:09d}.json"] = json.dumps({"caption": ["a cat ", "dog", "a cat", None, "dog", ""][n], "key": n}).encode()
    for n in (0, 1):
        files[f"{n:09d}.txt"] = [b" a cat", "hund ☃".encode()][n]
    files = dict(sorted(files.items()))
    make_tar(tmp_path / "cc" / "00000.tar", files)
    make_tar(tmp_path / "cc" / "00001.tar", {"x/1.png": encoded(tile(9), "PNG"), "x/1.txt": b"dog"})
    index = index_of(tmp_path / "index", tmp_path / "cc")
    assert [index.text(c) for c in range(7)] == ["a cat", "hund ☃", "a cat", "", "dog", "", "dog"]
    assert [index.read(i) for i in range(6)] == [files[f"{n:09d}.jpg"] for n in range(6)]
    ids = index.captions["id"].tolist()
    assert ids[0] == ids[2] == text_id("a cat") and ids[4] == ids[6] and len(set(ids)) == 5
    assert index.first.tolist() == list(range(8))  # real images stay units of their own
    by_glob = index_of(tmp_path / "glob", tmp_path / "cc" / "00000*.tar")
    assert by_glob.captions["id"].tolist() == ids[:6]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_kind_are_read(tmp_path, form):
    names = ["plain.jpg", "ünï.jpg", f"{'deep/' * 30}long.jpg", f"{'w' * 90}/y.jpg"]
    (tmp_path / "cc").mkdir()
    for number, chosen in enumerate([names[:1], names[1:2], names[2:], []]):
        with tarfile.open(tmp_path / "cc" / f"{number}.tar", "w", format=form) as tar:
            for name in chosen:
                info = tarfile.TarInfo(name)
                info.size, info.mtime = 5, 1.5  # type: ignore[assignment]  # as webdataset's writer: a pax header each
                tar.addfile(info, io.BytesIO(b"12345"))
    index = index_of(tmp_path / "index", tmp_path / "cc")
    assert [index.read(i) for i in range(4)] == [b"12345"] * 4 and len(index.images) == 4


def test_index_of_a_folder_of_pictures(tmp_path):
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    for n, name in enumerate(["a.jpg", "b.PNG", "deep/c.webp"]):
        form = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[name.lower().rpartition(".")[2]]
        (tmp_path / "pictures" / name).write_bytes(encoded(tile(n), form))
    (tmp_path / "pictures" / "deep" / "c.txt").write_text("a tile\n")
    (tmp_path / "pictures" / "notes.md").write_text("no picture")
    index = index_of(tmp_path / "index", tmp_path / "pictures")
    assert [index.text(c) for c in range(3)] == ["", "", "a tile"] and index.captions["id"][2] == text_id("a tile")
    assert [Path(index.name(i)).name for i in range(3)] == ["a.jpg", "b.PNG", "c.webp"]
    order = Order(0, index, "caption", 1, 3)
    (batch,) = stream(index, order, last=1, views=[View(32, downsample_p=0)])
    assert sorted(batch.texts) == ["", "", "a tile"] and batch.replaced == 0 and len(set(batch.ids.tolist())) == 3


def test_one_caption_has_one_id_in_every_source(tmp_path):
    make_run(tmp_path / "run", 2)
    make_tar(tmp_path / "cc" / "0.tar", {"0.jpg": encoded(tile(0)), "0.txt": b"caption 1 "})
    index = index_of(tmp_path / "index", tmp_path / "run", tmp_path / "cc")
    assert index.captions["id"][1] == index.captions["id"][2] and index.text(2) == "caption 1"
    assert [s.first for s in index.sources] == [0, 2] and index.source_of(1).name.endswith("run")
    assert index.source_of(2).name.endswith("cc") and index.read(6) == encoded(tile(0))


def test_bad_sources_are_said_and_leave_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "plan.json").write_text("{}")
    make_tar(tmp_path / "torn" / "0.tar", {"0.jpg": encoded(tile(0)), "1.jpg": encoded(tile(1))})
    os.truncate(tmp_path / "torn" / "0.tar", 2000)
    make_tar(tmp_path / "cut" / "0.tar", {"0.jpg": bytes(900)})
    os.truncate(tmp_path / "cut" / "0.tar", 1000)
    make_tar(tmp_path / "texts" / "0.tar", {"0.txt": b"no image"})
    make_run(tmp_path / "shardless", 5)
    (tmp_path / "shardless" / "shards" / "000001.json").unlink()
    for name, words in [
        ("empty", r"dataset\.json.*nor \*\.tar"),
        ("absent", "nothing to train on"),
        ("begun", "not complete"),
        ("torn", r"0\.tar.*remove it"),
        ("cut", r"0\.tar.*remove it"),
        ("texts", "holds no image"),
        ("shardless", "missing or torn"),
    ]:
        with pytest.raises(UsageError, match=words):
            index_of(tmp_path / "index", tmp_path / name)
        assert not [p for p in tmp_path.iterdir() if "index" in p.name]
    with pytest.raises(UsageError, match="no index"):
        open_index(tmp_path / "index")


def test_an_index_of_300_million_images_is_mapped_not_read(tmp_path):
    images = 300_000_000
    for name, dtype, length in [
        ("images", IMAGE, images), ("captions", CAPTION, images), ("first", np.int64, images + 1),
        ("names", np.uint8, 10), ("name_ends", np.int64, 1),
    ]:  # fmt: skip
        column = Column(tmp_path / f"{name}.npy", dtype)
        column.length = length
        column.close()
        start = os.path.getsize(tmp_path / f"{name}.npy")
        os.truncate(tmp_path / f"{name}.npy", start + length * np.dtype(dtype).itemsize)  # sparse: takes no disk
    source = {"name": "big", "first": 0, "captions": images, "first_image": 0, "images": images, "fewest": 1}
    write_json(tmp_path / "index.json", {"sources": [source]})
    before = resident()
    index = open_index(tmp_path)
    order = Order(0, index, "image", 1, 8192)
    chosen = np.concatenate([order._units_of(step) for step in range(3)])
    assert len(np.unique(chosen)) == 3 * 8192 and chosen.max() > 0.99 * images and len(index.images) == images
    assert resident() - before < 100e6  # 14 GB are mapped


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# --- order


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20, 1000, 4097])
def test_permute_is_a_permutation(size):
    whole = permute(5, np.arange(size), size)
    assert sorted(whole.tolist()) == list(range(size))
    assert whole[: size // 2].tolist() == permute(5, np.arange(size // 2), size).tolist()
    if size > 10:
        assert whole.tolist() != permute(6, np.arange(size), size).tolist()


def test_permutations_are_even():
    # Where each of 12 places goes, over 4,000 keys: a chi-square of 11 degrees of freedom a place.
    seen = np.stack([permute(derive("even", key), np.arange(12), 12) for key in range(4000)])
    for place in range(12):
        counts = np.bincount(seen[:, place], minlength=12)
        assert ((counts - 4000 / 12) ** 2 / (4000 / 12)).sum() < 35
    follows = (seen[:, 1] - seen[:, 0]) % 12
    assert ((np.bincount(follows, minlength=12)[1:] - 4000 / 11) ** 2 / (4000 / 11)).sum() < 35


def test_order_is_pure_covers_the_data_and_repeats_nothing(run):
    index = run[1]
    order, again = Order(3, index, "caption", 2, 4), Order(3, index, "caption", 2, 4)
    assert order.steps_per_epoch == 4
    for epoch in range(3):
        rows = [order.batch(step) for step in range(4 * epoch, 4 * epoch + 4)]
        assert sorted(np.concatenate([r.captions[::2] for r in rows]).tolist()) == list(range(16))
        for step, r in enumerate(rows, start=4 * epoch):
            assert (r.captions[::2] == r.captions[1::2]).all() and len(set(r.images.tolist())) == 8
            assert (r.images // 3 == r.captions).all() and r.digest() == again.batch(step).digest()
    digests = {order.batch(step).digest() for step in range(50)} | {Order(4, index, "caption", 2, 4).batch(0).digest()}
    assert len(digests) == 51
    pairs = np.concatenate([order.batch(step).images.reshape(-1, 2) for step in range(300)]) % 3
    assert np.bincount(pairs[:, 0] * 3 + pairs[:, 1], minlength=9)[[1, 2, 3, 5, 6, 7]].min() > 130  # of 1,200, 200 each


def test_every_rank_has_its_part_of_the_same_batch(run):
    order = Order(3, run[1], "image", 1, 8)
    rows = order.batch(7)
    assert len(set(rows.images.tolist())) == 8 and (rows.captions == rows.images // 3).all()
    for world in (1, 2, 4):
        parts = [rank_rows(rows, rank, world) for rank in range(world)]
        assert np.concatenate([p.images for p in parts]).tolist() == rows.images.tolist()
        assert np.concatenate([p.positions for p in parts]).tolist() == list(range(8))


def test_weights_share_out_an_epoch_and_a_source_is_gone_through_before_it_repeats(tmp_path):
    for name, captions in (("small", 8), ("large", 24)):
        make_run(tmp_path / name, captions, images=1, a_shard=8)
    index = index_of(tmp_path / "index", tmp_path / "small", tmp_path / "large")
    by_size, even = Order(0, index, "caption", 1, 4), Order(0, index, "caption", 1, 4, [1, 1])
    assert sorted(np.concatenate([by_size.batch(s).captions for s in range(8)]).tolist()) == list(range(32))
    drawn = np.concatenate([even.batch(s).captions for s in range(24)])  # three epochs of 16 + 16
    assert (drawn < 8).sum() == (drawn >= 8).sum() == 48
    assert set(np.bincount(drawn[drawn < 8], minlength=8)) == {6}
    assert set(np.bincount(drawn[drawn >= 8] - 8, minlength=24)) == {2}
    never = Order(0, index, "caption", 1, 4, [0, 2.5])
    assert min(never.batch(s).captions.min() for s in range(8)) >= 8
    for weights in ([1], [1, -1], [0, 0], [1, float("nan")], [1, float("inf")]):
        with pytest.raises(UsageError, match="data-weights"):
            Order(0, index, "caption", 1, 4, weights)


def test_a_source_with_too_few_images_is_named(run, tmp_path):
    with pytest.raises(UsageError, match=r"/run holds 3 images of a caption, 4 are asked for"):
        Order(0, run[1], "caption", 4, 2)
    with pytest.raises(UsageError, match="17 captions needs more than the 16 of the data"):
        Order(0, run[1], "caption", 1, 17)


# --- augmentations, beside torchvision's


def cropped(data, views, u):
    """The crops of a picture, in new arrays."""
    out = [np.empty((3, view.size, view.size), np.uint8) for view in views]
    crops(data, views, u, out)
    return out


def test_crops_are_distributed_as_torchvisions():
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    for height, width, scale in ((256, 256, (0.08, 1.0)), (200, 300, (0.3, 1.0)), (60, 600, (0.5, 1.0))):
        picture, view = torch.zeros(1, height, width), View(224, crop_min=scale[0], crop_max=scale[1])
        theirs = np.array([RandomResizedCrop.get_params(picture, scale, (3 / 4, 4 / 3)) for _ in range(3000)])  # type: ignore[arg-type]
        ours = np.array([crop_box(height, width, view, u) for u in uniforms(derive("test"), np.arange(3000), NUMBERS)])
        for quantity in (lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2]):
            assert ks_2samp(quantity(ours), quantity(theirs)).pvalue > 1e-3
        assert (ours[:, 0] + ours[:, 2]).max() <= height and (ours[:, 1] + ours[:, 3]).max() <= width


def test_colour_parameters_are_distributed_as_torchvisions():
    from torchvision.transforms import ColorJitter

    torch.manual_seed(0)
    draws = draw(View(224), 0, 0, 0, np.arange(6000))
    jitter = ColorJitter(0.4, 0.4, 0.4, 0.1)
    theirs = [jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(6000)]
    for k in range(4):
        assert ks_2samp(draws.factors[:, k], [t[1 + k] for t in theirs]).pvalue > 1e-3
    # Each of the 24 orders of the four operations: 250 of 6,000, and the same from torchvision.
    for orders in (draws.order, np.array([t[0].tolist() for t in theirs])):
        counts = np.unique(orders @ [64, 16, 4, 1], return_counts=True)[1]
        assert len(counts) == 24 and ((counts - 250) ** 2 / 250).sum() < 50
    for share, p in ((draws.jitter, 0.8), (draws.grey, 0.2), (draws.blur, 0.5)):
        assert abs(share.mean() - p) < 4 * (p * (1 - p) / 6000) ** 0.5
    assert ks_2samp(draws.sigma, np.linspace(0.1, 2.0, 6000)).pvalue > 1e-3
    chance = np.stack([draws.jitter, draws.grey, draws.blur, *draws.factors.T, draws.sigma])
    assert np.abs(np.corrcoef(chance) - np.eye(8)).max() < 0.06
    half = draw(View(112), 0, 0, 0, np.arange(6000))
    assert np.allclose(half.sigma * 2, draws.sigma)  # blur is meant for 224 px


OPERATIONS = ["brightness", "contrast", "saturation", "hue"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_jitter_is_torchvisions(operation):
    from torchvision.transforms.v2 import functional

    x = torch.from_numpy(np.stack([tile(n, 48) for n in range(8)])).permute(0, 3, 1, 2).contiguous() / 255
    x[0], x[1, 0], x[2, :, :5], x[3, 1] = 0.5, x[1, 1], 0, x[3, 2]  # grey, ties between channels, black
    values = torch.linspace(-0.5, 0.5, 8) if operation == "hue" else torch.linspace(0.6, 1.4, 8)
    want = torch.stack([getattr(functional, f"adjust_{operation}")(p, float(v)) for p, v in zip(x, values, strict=True)])
    assert torch.allclose(getattr(colour, operation)(x, values.view(-1, 1, 1, 1)), want, atol=5e-6)
    for picture, value, wanted in zip(x.numpy(), values.tolist(), want.numpy(), strict=True):
        getattr(colour_cpu, operation)(picture, value)
        assert np.allclose(picture, wanted, atol=5e-6)


def test_blur_is_torchvisions():
    from torchvision.transforms.v2 import functional

    for sigma in (0.02, 0.1, 0.5, 1.0, 2.0):
        x, radius = torch.rand(3, 3, 30, 41, generator=torch.Generator().manual_seed(0)), int(np.ceil(3 * sigma))
        want = functional.gaussian_blur(x, [2 * radius + 1] * 2, [sigma] * 2)
        assert torch.allclose(colour.blur(x, torch.full((3, 1, 1, 1), sigma), radius), want, atol=5e-6)
        colour_cpu.blur(x[0].numpy(), sigma, radius)
        assert torch.allclose(x[0], want[0], atol=5e-6)


def test_solarisation_is_torchvisions_and_happens_as_often_as_it_should():
    from torchvision.transforms.v2 import functional

    x = torch.from_numpy(np.stack([tile(n, 48) for n in range(4)])).permute(0, 3, 1, 2).contiguous() / 255
    want = functional.solarize(x, 0.5)
    assert colour.solarize(x).equal(want) and not want.equal(x)
    for picture, wanted in zip(x.numpy(), want.numpy(), strict=True):
        colour_cpu.solarize(picture)
        assert (picture == wanted).all()
    draws, plain = draw(View(224, solarize_p=0.2), 0, 0, 0, np.arange(6000)), draw(View(224), 0, 0, 0, np.arange(6000))
    assert abs(draws.solarize.mean() - 0.2) < 0.02 and not plain.solarize.any()
    assert (draws.factors == plain.factors).all() and abs(np.corrcoef(draws.solarize, draws.blur)[0, 1]) < 0.06


def test_a_batch_is_coloured_as_torchvision_would_row_by_row():
    from torchvision.transforms.v2 import functional

    x = torch.from_numpy(np.stack([tile(n, 48) for n in range(24)])).permute(0, 3, 1, 2).contiguous()
    draws = draw(View(48, solarize_p=0.3), 0, 0, 0, np.arange(24))
    assert all(0 < happens.sum() < 24 for happens in (draws.jitter, draws.grey, draws.blur, draws.solarize))
    batch, one_by_one = colour.colour(x, draws), colour_cpu.colour(x.numpy(), draws)
    for row, picture in enumerate(x / 255):
        for k in draws.order[row] if draws.jitter[row] else []:
            picture = getattr(functional, f"adjust_{OPERATIONS[k]}")(picture, float(draws.factors[row, k]))
        if draws.grey[row]:
            picture = functional.rgb_to_grayscale(picture, 3)
        if draws.blur[row]:
            picture = functional.gaussian_blur(picture, [2 * int(draws.radius[row]) + 1] * 2, [float(draws.sigma[row])] * 2)
        if draws.solarize[row]:
            picture = functional.solarize(picture, 0.5)
        assert torch.allclose(batch[row], picture * 2 - 1, atol=5e-5)
        assert np.allclose(one_by_one[row], picture.numpy() * 2 - 1, atol=5e-5)


def test_crops_look_as_torchvisions_at_any_size():
    from torchvision.transforms.v2 import functional

    view = View(64, downsample_p=0, flip_p=0)
    for picture in (PHOTO, PHOTO[:100, :120], np.ascontiguousarray(PHOTO[:30, :40]), np.tile(PHOTO, (3, 3, 1))):
        for u in uniforms(derive("look"), np.arange(4), NUMBERS):
            top, left, h, w = crop_box(*picture.shape[:2], view, u)
            theirs = functional.resized_crop(Image.fromarray(picture), top, left, h, w, [64, 64], antialias=True)
            want = np.asarray(theirs).transpose(2, 0, 1).astype(float)
            (png,) = cropped(encoded(picture, "PNG"), [view], u[None])
            assert np.abs(png - want).mean() < 4
            # A JPEG that is decoded smaller is cropped on the pixels of the smaller one: half a pixel off.
            (jpeg,) = cropped(encoded(picture), [view], u[None])
            assert np.abs(blocks(jpeg) - blocks(want)).mean() < 5


def blocks(picture):
    """Means of 4 x 4 pixels."""
    return picture.reshape(3, 16, 4, 16, 4).mean((2, 4))


def test_downsampling_and_flip_happen_as_often_as_they_should():
    data = encoded(np.ascontiguousarray(PHOTO[:200, :200]))
    plain = View(96, crop_min=1.0, downsample_p=0, flip_p=0, crop_max=1.0)
    u = uniforms(derive("often"), np.arange(400), NUMBERS)
    for u_row in u[:2]:
        whole = cropped(data, [plain], u_row[None])[0]
        assert (cropped(data, [View(96, 1.0, 1.0, 0, 1.0)], u_row[None])[0] == whole[:, :, ::-1]).all()
    sharp = [np.abs(np.diff(cropped(data, [plain], r[None])[0].astype(int))).mean() for r in u[:5]]
    for p, size in ((64, u[:, -2] < 0.5), (128, u[:, -2] >= 0.5)):
        row = u[np.flatnonzero(size)[0]]
        low = cropped(data, [View(96, 1.0, 1.0, 1.0, 0)], row[None])[0]
        assert np.abs(np.diff(low.astype(int))).mean() < (0.8 if p == 64 else 1.0) * min(sharp)
    assert abs((u[:, -3] < 0.05).mean() - 0.05) < 0.03 and abs((u[:, -1] < 0.5).mean() - 0.5) < 0.08
    tiny = encoded(tile(0, 60))
    assert (cropped(tiny, [View(32, 1.0, 1.0, 1.0, 0)], u[:1])[0] == cropped(tiny, [View(32, 1.0, 1.0, 0, 0)], u[:1])[0]).all()
    assert resize(PHOTO, 50, 70).shape == (50, 70, 3)


# --- batches


def stream(index, order, views=None, first=0, last=4, rank=0, world=1, workers=2, max_broken=0.5, told=None):
    """The batches of a rank; `told` collects what `on_broken` heard."""
    return list(open_stream(index, order, views, first, last, rank, world, workers, max_broken, told))


def open_stream(index, order, views=None, first=0, last=4, rank=0, world=1, workers=2, max_broken=0.5, told=None):
    told = [] if told is None else told
    return batches(
        index, order, views or [View(32), View(24)], seed=1, first=first, last=last, rank=rank, world=world, workers=workers,
        device=CPU, max_broken=max_broken, on_broken=lambda name, why: told.append((name, why)),
    )  # fmt: skip


def same(a, b):
    return all(x.equal(y) for x, y in zip(a.views, b.views, strict=True)) and a.texts == b.texts and a.ids.equal(b.ids)


def children():
    """Living forks of this process: child processes with its own command line (a zombie has none)."""
    found = [p for t in Path("/proc/self/task").iterdir() for p in (t / "children").read_text().split()]
    own = Path("/proc/self/cmdline").read_bytes()
    return [int(p) for p in found if Path(f"/proc/{p}/cmdline").read_bytes() == own]


def test_batches_are_equal_at_any_rank_count_workers_and_start(run):
    samples, index = run
    order = Order(0, index, "caption", 2, 4)
    whole = stream(index, order, last=6)
    assert [b.step for b in whole] == list(range(6)) and whole[0].views[0].shape == (8, 3, 32, 32)
    assert whole[0].views[1].shape == (8, 3, 24, 24) and -1 <= whole[0].views[0].min() < whole[0].views[0].max() <= 1
    texts = {text_id(s.text): s.text for s in samples}
    assert all(texts[i] == t for b in whole for i, t in zip(b.ids.tolist(), b.texts, strict=True))
    assert [b.digest for b in whole] == [order.batch(s).digest() for s in range(6)] and whole[0].replaced == 0
    for world, workers in ((2, 1), (4, 3)):
        ranks = [stream(index, order, last=2, rank=rank, world=world, workers=workers) for rank in range(world)]
        for step in range(2):
            for v in range(2):
                assert torch.cat([r[step].views[v] for r in ranks]).equal(whole[step].views[v])
            assert torch.cat([r[step].ids for r in ranks]).equal(whole[step].ids)
            assert {r[step].digest for r in ranks} == {whole[step].digest}
    resumed = stream(index, order, first=3, last=6)
    assert all(same(a, b) for a, b in zip(resumed, whole[3:], strict=True))
    assert not children()


def test_ids_of_images_are_their_own(run):
    order = Order(0, run[1], "image", 1, 8)
    (batch,) = stream(run[1], order, last=1)
    assert batch.ids.tolist() == order.batch(0).images.tolist()


def test_a_killed_worker_is_replaced_and_nothing_changes(run):
    index = run[1]
    order = Order(0, index, "caption", 2, 4)
    whole, told, got = stream(index, order, last=8), [], []
    batch_stream = open_stream(index, order, last=8, told=told)
    for batch in batch_stream:
        got.append(batch)
        if batch.step in (1, 4):
            os.kill(children()[0], signal.SIGKILL)
    assert len(got) == 8 and all(same(a, b) for a, b in zip(got, whole, strict=True))
    assert told and all(name == "loader" and "SIGKILL" in why for name, why in told) and not children()


def test_rows_that_keep_killing_their_worker_end_the_run(run, monkeypatch):
    def deadly(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("stablerep.data.workers.crops", deadly)
    with pytest.raises(WorkError, match=r"died of SIGKILL at step 0.*3 times"):
        stream(run[1], Order(0, run[1], "caption", 2, 4))
    assert not children()


def test_a_fault_in_a_worker_is_one_line(run, monkeypatch):
    monkeypatch.setattr("stablerep.data.workers.uniforms", lambda *_: 1 / 0)
    with pytest.raises(WorkError, match="failed at step 0: ZeroDivisionError"):
        stream(run[1], Order(0, run[1], "caption", 2, 4))


def test_workers_ignore_stop_signals_and_end_with_the_loader(run):
    order = Order(0, run[1], "caption", 2, 4)
    batch_stream = open_stream(run[1], order, last=8)
    first = next(batch_stream)
    workers = children()
    assert len(workers) == 2
    for pid in workers:
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        assert any(line.endswith("images.npy") and " r--s " in line for line in maps)  # shared, not copied
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT):
            os.kill(pid, number)
    assert [first.step, *(b.step for b in batch_stream)] == list(range(8))
    assert not children()


CHILD = """
import sys
sys.path.insert(0, {repo!r})
from pathlib import Path
import torch
from stablerep.data.augment import View
from stablerep.data.index import open_index
from stablerep.data.loader import batches
from stablerep.data.order import Order
index = open_index(Path({index!r}))
stream = batches(index, Order(0, index, "caption", 2, 4), [View(32)], seed=0, first=0, last=9, rank=0, world=1, workers=2,
                 device=torch.device("cpu"), max_broken=0, on_broken=print)
next(stream)
me = Path("/proc/self/task").iterdir()
print(" ".join(w for t in me for w in (t / "children").read_text().split()), flush=True)
if {end!r} == "exit": raise SystemExit
sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["exit", "killed"])
def test_no_worker_outlives_its_parent(run, end):
    child = CHILD.format(repo=str(REPO), index=str(run[1]._folder), end=end)
    with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        workers = process.stdout.readline().split()
        assert len(workers) == 2
        if end == "killed":
            process.kill()
    assert process.returncode == (0 if end == "exit" else -9)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 30, "workers to end")


def test_a_broken_image_is_named_and_replaced_by_another_of_its_caption(tmp_path):
    make_run(tmp_path / "run", 8, broken=(4, 12, 13, 14))  # one of caption 1; all of caption 4
    index = index_of(tmp_path / "index", tmp_path / "run")
    order, told = Order(0, index, "caption", 3, 4), []
    got = stream(index, order, last=2, told=told)
    planned = np.concatenate([order.batch(s).captions for s in range(2)])
    ids, used = index.captions["id"].tolist(), torch.cat([b.ids for b in got]).tolist()
    for caption, id in zip(planned.tolist(), used, strict=True):
        assert (id == ids[caption]) == (caption != 4)
    assert len({id for caption, id in zip(planned, used, strict=True) if caption == 4}) == 1  # they moved together
    assert sum(b.replaced for b in got) == 4 and {index.name(i) for i in (4, 12, 13, 14)} == {name for name, _ in told}
    assert all("000001.tar at byte" in name or "000000.tar at byte" in name for name, _ in told)
    again = stream(index, order, last=2, workers=1)
    assert all(same(a, b) for a, b in zip(got, again, strict=True))
    assert torch.isfinite(got[0].views[0]).all()


def test_too_many_broken_images_stop_the_run(tmp_path):
    make_run(tmp_path / "run", 8, broken=range(0, 24, 3))
    index = index_of(tmp_path / "index", tmp_path / "run")
    order = Order(0, index, "caption", 3, 8)
    assert len(stream(index, order, last=40, max_broken=0.6)) == 40
    with pytest.raises(WorkError, match=r"of 504 images read are broken, more than --max-broken 0\.2 allows: .*000000\.tar"):
        stream(index, order, last=40, max_broken=0.2)
    for tar in (tmp_path / "run" / "shards").glob("*.tar"):
        tar.unlink()
    with pytest.raises(WorkError, match=r"20 pictures in a row cannot be read.*No such file"):
        stream(index, order, last=2)
    assert not children()
