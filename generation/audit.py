"""Verify a generated dataset: python generation/audit.py RUN [--remake 3] [--repair]"""

import hashlib
import io
import json
import random
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: sys.path[0] is this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from stablerep.runtime.config import key, parse, run_command
from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import file_hash, read_json

if TYPE_CHECKING:
    from generation.plan import Plan


@dataclass
class AuditConfig:
    """What is checked."""

    runs: list[str] = key([], "run folders")
    remake: int = key(0, "also make the images of N captions again and compare them byte for byte")
    device: str = key("cpu", "where --remake runs; bytes are equal only on the hardware that made them")
    repair: bool = key(False, "forget broken shards, so that the same generate command makes them again")


def check_shard(run: Path, plan: "Plan", number: int) -> str | None:
    """What is wrong with a shard, or None: its hash, that tar and sidecar hold the plan's members in the plan's order and no
    others, counts, captions, that a sample's JSON names it, and that every JPEG decodes whole."""
    import simplejpeg

    from generation.captions import read_captions
    from stablerep.data.shards import read_sidecar, shard_name

    sidecar = read_sidecar(run / "shards", number)
    if sidecar is None:
        return "no valid sidecar, or a tar of another size"
    data = (run / "shards" / f"{shard_name(number)}.tar").read_bytes()
    if hashlib.sha256(data).hexdigest() != sidecar["sha256"]:
        return "the tar's SHA-256 is not the sidecar's"
    texts = read_captions(run / "captions.parquet", *plan.rows(number))
    endings = [*(f"{j}.jpg" for j in range(plan.images_per_caption)), "txt", "json"]
    wanted = [f"{id}.{ending}" for id, _ in texts for ending in endings]
    differ = {*wanted} ^ {name for name, _, _ in sidecar["members"]}
    if differ:
        return f"{min(differ)} is {'missing' if min(differ) in wanted else 'not in the plan'} ({len(differ)} such members)"
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = [(m.name, m.offset_data, m.size) for m in tar]
    if [name for name, _, _ in members] != wanted or [list(m) for m in members] != sidecar["members"]:
        return "the sidecar does not say where the tar's members lie, or their order is not the plan's"
    if (sidecar["samples"], sidecar["images"]) != (len(texts), len(texts) * plan.images_per_caption):
        return f"the sidecar counts {sidecar['samples']} captions and {sidecar['images']} images"
    content = {name: data[offset : offset + size] for name, offset, size in members}
    for id, text in texts:
        if content[f"{id}.txt"] != text.encode():
            return f"caption {id} differs"
        if json.loads(content[f"{id}.json"])["id"] != id:
            return f"{id}.json names another caption"
    for name in (n for n in wanted if n.endswith(".jpg")):
        try:
            simplejpeg.decode_jpeg(content[name])
        except ValueError as error:
            return f"{name} does not decode: {error}"
    return None


def check_run(run: Path, plan: "Plan") -> str | None:
    """What is wrong with the frozen captions, or with dataset.json where there is one; None where nothing is."""
    from stablerep.data.shards import read_sidecar

    if file_hash(run / "captions.parquet") != plan.captions_sha256:
        return "captions.parquet is not the one that was planned"
    if not (run / "dataset.json").exists():
        return None
    dataset = read_json(run / "dataset.json")
    counts = (dataset["captions"], dataset["images"], dataset["plan_hash"], len(dataset["shardlist"]))
    if counts != (plan.captions, plan.images, plan.hash, plan.shards):
        return "dataset.json is of another plan"
    for number, shard in enumerate(dataset["shardlist"]):
        sidecar = read_sidecar(run / "shards", number)
        if sidecar is not None and sidecar["sha256"] != shard["sha256"]:
            return f"dataset.json has another SHA-256 for {shard['url']}"
    return None


def differing_captions(run: Path, count: int, device: str) -> list[str]:
    """Make the images of `count` random captions again; the ids of those whose bytes differ."""
    from generation.pipeline import load
    from generation.plan import load_plan
    from generation.remake import remake, stored

    plan = load_plan(run)
    rows = random.sample(range(plan.captions), min(count, plan.captions))
    chosen = [stored(run, plan, row) for row in rows]
    images = remake(load(run, device), chosen)
    return [caption.caption[0] for caption, made in zip(chosen, images, strict=True) if made != caption.images]


def main(argv: list[str]) -> int:
    """Audit runs; 0 where all is well, 1 where something is broken."""
    config = parse(AuditConfig, argv, prog="audit.py", about="Verify generated datasets.", positional="runs")
    if not config.runs:
        raise UsageError("which run? python generation/audit.py RUN")
    from generation.plan import load_plan
    from generation.remake import check_device
    from stablerep.data.shards import shard_name

    if config.remake:
        check_device(config.device)
    wrong = 0
    for name in config.runs:
        run = Path(name)
        plan = load_plan(run)
        broken = []
        unsound = check_run(run, plan)
        if unsound:
            print(f"{run}: {unsound}")
        for number in range(plan.shards):
            problem = check_shard(run, plan, number)
            if problem:
                broken.append(number)
                print(f"{run}: shard {shard_name(number)}: {problem}")
        if (broken or unsound) and config.repair:
            (run / "dataset.json").unlink(missing_ok=True)
            for number in broken:
                (run / "shards" / f"{shard_name(number)}.json").unlink(missing_ok=True)
            print(f"{run}: {len(broken)} shards forgotten; the same generate command makes them again")
        complete = (run / "dataset.json").exists()
        differing = differing_captions(run, config.remake, config.device) if config.remake and complete else []
        for id in differing:
            print(f"{run}: caption {id}: images remade on {config.device} differ")
        if config.remake:
            done = f"{min(config.remake, plan.captions)} captions were remade and compared" if complete else "nothing is remade"
            print(f"{run}: {done}{'' if complete else ' before the run is complete'}")
        wrong += len(broken) + len(differing) + bool(unsound)
        if not broken and not differing and not unsound:
            state = "complete" if complete else "no dataset.json yet"
            print(f"{run}: {plan.shards} shards, {plan.images} images, all sound ({state})")
    return 1 if wrong else 0


if __name__ == "__main__":
    run_command(main)
