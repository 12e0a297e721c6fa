"""The whole pipeline on this machine in minutes: python launch/demo.py (or make demo)"""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: sys.path[0] is this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from stablerep.runtime.config import from_yaml, key, parse, run_command
from stablerep.runtime.errors import WorkError
from stablerep.runtime.rundir import REPO, data_folder, read_json, read_jsonl

GUIDANCE = (1.0, 2.0, 4.0, 8.0)


@dataclass
class DemoConfig:
    """Size of the demo."""

    out: str = key("demo", "folder of the demo")
    captions: list[str] = key([str(data_folder("assets") / "captions.txt")], "caption files")
    images_per_caption: int = key(8, "images a caption")
    steps: int = key(320, "training steps of each method")
    workers: int = key(2, "worker processes and training ranks")


def call(*words: str) -> None:
    """Run one of our commands, showing it. Raises WorkError where it fails."""
    print(f"\n$ python {' '.join(words)}", flush=True)
    code = subprocess.run([sys.executable, str(REPO / words[0]), *words[1:]]).returncode
    if code:
        raise WorkError(f"{words[0]} ended with exit code {code}; what it printed above says why")


def guidance_strip(run: Path, count: int) -> tuple[list[str], dict[float, list[bytes]]]:
    """Image 0 of `count` captions at each guidance scale."""
    from generation.captions import read_captions
    from generation.pipeline import TextToImage, generate_captions
    from generation.plan import load_plan
    from generation.settings import GenerateConfig

    chosen = read_captions(run / "captions.parquet", 0, min(count, load_plan(run).captions))
    strip = {}
    for scale in GUIDANCE:
        config = from_yaml(GenerateConfig, run / "config.yaml")
        config.guidance_scale, config.images_per_caption = scale, 1
        made = generate_captions(TextToImage(config, "cpu"), chosen)
        assert made is not None
        strip[scale] = [images[0] for images in made]
    return [text for _, text in chosen], strip


def main(argv: list[str]) -> int:
    """Generate, train twice, evaluate, write the page."""
    config = parse(DemoConfig, argv, prog="demo.py", about="Captions to encoder on this machine; ends with a page.")
    start = time.time()
    out = Path(config.out)
    images = out / "images"
    call(
        "launch/generate.py", "--captions", *config.captions, "--out", str(images), "--cluster", "local",
        "--nodes", str(config.workers), "--images-per-caption", str(config.images_per_caption),
        "--captions-per-shard", "16",
    )  # fmt: skip
    for method, batch in (("stablerep", 240), ("simclr", 120)):  # as many crops: SimCLR makes two of an image
        call(
            "launch/train.py", "--config", str(data_folder("configs") / "train" / "demo.yaml"), "--method", method,
            "--data", str(images), "--out", str(out / method), "--cluster", "local",
            "--nodes", str(config.workers), "--steps", str(config.steps), "--global-batch", str(batch),
        )  # fmt: skip
    print("\nscoring on real pictures", flush=True)
    from launch.evaluate import EvaluateConfig, evaluate

    names = {str(out / "stablerep"): "StableRep on generated images", str(out / "simclr"): "SimCLR on the same images"}
    results = evaluate(EvaluateConfig(checkpoint=list(names)))
    report = write_page(config, images, results, names, time.time() - start)
    print(f"\nopen {report}")
    return 0


def write_page(config: DemoConfig, images: Path, results: Any, names: dict[str, str], seconds: float) -> Path:
    """Collect the pieces of the page and write it."""
    from generation.plan import load_plan
    from launch.progress import duration
    from launch.report import write_report
    from stablerep.data.shards import DatasetIndex
    from stablerep.runtime.events import read_events

    index = DatasetIndex(images)
    shown = range(0, len(index), max(1, len(index) // 16))
    cards = [(index.text(i), [index.read(i, j) for j in range(min(6, index.images_per_caption))]) for i in list(shown)[:16]]
    strip_captions, strip = guidance_strip(images, 8)
    commits = [e for e in read_events(images) if e["event"] == "committed"]
    rate = sum(e["images"] for e in commits) / max(1e-9, sum(e["seconds"] for e in commits)) * config.workers
    curves = {Path(n).name: list(read_jsonl(Path(n) / "metrics.jsonl")) for n in names}
    speed = [r["images_per_s"] for r in curves["stablerep"]]
    report = Path(config.out) / "report.html"
    write_report(
        report,
        captions=cards,
        strip=strip,
        strip_captions=strip_captions,
        curves=curves,
        results=results,
        names=names,
        facts={
            "images generated": f"{load_plan(images).images:,}",
            "images/s generated": f"{rate:.0f}",
            "images/s trained": f"{sorted(speed)[len(speed) // 2]:.0f}",
            "steps of training": str(read_json(Path(next(iter(names))) / "train.json")["steps"]),
            "minutes in all": duration(seconds),
        },
    )
    return report


if __name__ == "__main__":
    run_command(main)
