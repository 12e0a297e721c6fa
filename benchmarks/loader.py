"""Images/s on one core, beside the pipeline that StableRep's official code uses (PIL and torchvision):
python benchmarks/loader.py [--rounds 5]. Real photographs in pieces of 256 px, out comes a batch at 224 px."""

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path[0] = str(Path(__file__).resolve().parents[1])

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images
from torchvision import transforms

from stablerep.data import colour, colour_cpu
from stablerep.data.augment import View, draw
from stablerep.data.index import Column, Index, build_index, open_index
from stablerep.data.order import Order
from stablerep.data.sources import CAPTION, IMAGE
from stablerep.data.workers import Slots, Task, fill
from stablerep.runtime.rundir import write_json

STORED, OUT, BATCH = 256, 224, 64


def write_tiles(folder: Path) -> tuple[list[Path], list[Path]]:
    """Pieces of two photographs (a temple, a flower) as JPEG at quality 95 and as PNG, in two folders."""
    paths: tuple[list[Path], list[Path]] = ([], [])
    for number, picture in enumerate(load_sample_images().images):
        for top in range(0, picture.shape[0] - STORED, 42):
            for left in range(0, picture.shape[1] - STORED, 48):
                tile = Image.fromarray(picture[top : top + STORED, left : left + STORED])
                for kind, (form, options) in enumerate((("jpg", {"quality": 95}), ("png", {}))):
                    path = folder / form / f"{number}-{top:03d}-{left:03d}.{form}"
                    path.parent.mkdir(exist_ok=True)
                    tile.save(path, **options)
                    paths[kind].append(path)
    return paths


def papers_pipeline() -> Callable[[Path], torch.Tensor]:
    """The official augmentations, on PIL images."""
    steps = transforms.Compose(
        [
            transforms.RandomApply([lambda p: p.resize((random.choice((64, 128)),) * 2).resize(p.size)], p=0.05),
            transforms.RandomResizedCrop(OUT, scale=(0.08, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(0.2),
            transforms.RandomApply([lambda p: p.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))], p=0.5),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    return lambda path: steps(Image.open(path).convert("RGB"))


class Ours:
    """A loader worker's task on one batch after the other, and the colour work after it."""

    def __init__(self, index: Index, paint: Callable[..., object] | None) -> None:
        self.view, self.paint, self.step = View(OUT), paint, 0
        self.index, self.order = index, Order(0, index, "image", 1, BATCH)
        self.slots = Slots(1, BATCH, [self.view])

    def __call__(self) -> None:
        rows = self.order.batch(self.step)
        fill(Task(self.step, 0, 0, rows), self.slots, self.index, [self.view], seed=0, texts=False)
        if self.paint:
            self.paint(self.slots.views[0][0], draw(self.view, 0, self.step, 0, rows.positions))
        self.step += 1


def speed(work: Callable[[], object], images: int, seconds: float = 2.0) -> float:
    """Images a second of CPU time (what else the machine does counts little), of `work`, which does `images` of them."""
    start, done = time.process_time(), 0
    while (elapsed := time.process_time() - start) < seconds:
        work()
        done += images
    return done / elapsed


def big_index(folder: Path, images: int = 300_000_000) -> tuple[float, float]:
    """(seconds to open an index of 300 M images, seconds a batch of 8,192 takes to be ordered); the arrays are sparse."""
    shapes = [("images", IMAGE, images), ("captions", CAPTION, images), ("first", np.int64, images + 1)]
    for name, dtype, length in [*shapes, ("names", np.uint8, 10), ("name_ends", np.int64, 1)]:
        column = Column(folder / f"{name}.npy", dtype)
        column.length = length
        column.close()
        path = folder / f"{name}.npy"
        os.truncate(path, path.stat().st_size + length * np.dtype(dtype).itemsize)
    source = {"name": "big", "first": 0, "captions": images, "first_image": 0, "images": images, "fewest": 1}
    write_json(folder / "index.json", {"sources": [source]})
    start = time.perf_counter()
    order = Order(0, open_index(folder), "image", 1, 8192)
    opened = time.perf_counter()
    order.batch(0)
    return opened - start, time.perf_counter() - opened


def main() -> None:
    """Measure in turns, and print the median of each and of the ratios."""
    rounds = argparse.ArgumentParser()
    rounds.add_argument("--rounds", type=int, default=5)
    count = rounds.parse_args().rounds
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jpegs, pngs = write_tiles(folder)
        for form in ("jpg", "png"):
            build_index([str(folder / form)], folder / f"index-{form}", lambda line: None)
        papers = papers_pipeline()
        jpeg, png = open_index(folder / "index-jpg"), open_index(folder / "index-png")

        def tensors(pictures: np.ndarray, draws: object) -> None:
            colour.colour(torch.from_numpy(pictures), draws)  # type: ignore[arg-type]

        contenders: dict[str, tuple[Callable[[], object], int]] = {
            "PIL + torchvision, PNG (the paper's)": (lambda: papers(random.choice(pngs)), 1),
            "PIL + torchvision, JPEG": (lambda: papers(random.choice(jpegs)), 1),
            "ours, JPEG, colour left to the device": (Ours(jpeg, None), BATCH),
            "ours, JPEG, all on the CPU": (Ours(jpeg, colour_cpu.colour), BATCH),
            "ours, JPEG, all on the CPU by the device's code": (Ours(jpeg, tensors), BATCH),
            "ours, PNG, colour left to the device": (Ours(png, None), BATCH),
        }
        measured = np.array([[speed(*c) for c in contenders.values()] for _ in range(count)])
        size = sum(p.stat().st_size for p in jpegs) / len(jpegs), sum(p.stat().st_size for p in pngs) / len(pngs)
        (folder / "big").mkdir()
        opened, ordered = big_index(folder / "big")
    model = next(line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    print(
        f"one core of {os.cpu_count()} ({model}), {time.strftime('%Y-%m-%d')}; {STORED} px, JPEG {size[0] / 1e3:.0f} kB, ",
        end="",
    )
    print(f"PNG {size[1] / 1e3:.0f} kB; median of {count} rounds in turn, CPU time\n")
    print("| pipeline | images/s | against PNG | against JPEG |\n|---|---|---|---|")
    for k, contender in enumerate(contenders):
        ratios = [f"{np.median(measured[:, k] / measured[:, base]):.1f}x" for base in (0, 1)]
        print(f"| {contender} | {np.median(measured[:, k]):,.0f} | {' | '.join(ratios)} |")
    print(
        f"\nan index of 300 M images opens in {opened * 1e3:.0f} ms; the order of a batch of 8,192 takes {ordered * 1e3:.1f} ms"
    )


if __name__ == "__main__":
    main()
