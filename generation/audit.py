"""Verify a generated dataset: python generation/audit.py RUN [--remake 3] [--repair]"""

import hashlib
import random
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: sys.path[0] is this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from stablerep.runtime.config import key, parse, run_command
from stablerep.runtime.errors import UsageError


@dataclass
class AuditConfig:
    """What is checked."""

    runs: list[str] = key([], "run folders")
    remake: int = key(0, "also make the images of N captions again and compare them byte for byte")
    device: str = key("cpu", "where --remake runs; bytes are equal only on the hardware that made them")
    repair: bool = key(False, "forget broken shards, so that the same generate command makes them again")


def check_shard(run: Path, number: int, texts: list[tuple[str, str]]) -> str | None:
    """What is wrong with a shard, or None: sidecar, size, hash, members, captions, and that every JPEG decodes."""
    import simplejpeg

    from stablerep.data.shards import read_sidecar, shard_name

    sidecar = read_sidecar(run / "shards", number)
    if sidecar is None:
        return "no valid sidecar, or a tar of another size"
    data = (run / "shards" / f"{shard_name(number)}.tar").read_bytes()
    if hashlib.sha256(data).hexdigest() != sidecar["sha256"]:
        return "the tar's SHA-256 is not the sidecar's"
    members = {name: data[offset : offset + size] for name, offset, size in sidecar["members"]}
    for id, text in texts:
        if members.get(f"{id}.txt") != text.encode():
            return f"caption {id} is missing or differs"
    for name, content in members.items():
        if name.endswith(".jpg"):
            try:
                simplejpeg.decode_jpeg(content)
            except ValueError as error:
                return f"{name} does not decode: {error}"
    return None


def differing_captions(run: Path, count: int, device: str) -> list[str]:
    """Make the images of `count` random captions again; the ids of those whose bytes differ."""
    from generation.captions import read_captions
    from generation.pipeline import load
    from generation.plan import load_plan
    from generation.remake import remake, stored_images

    plan = load_plan(run)
    rows = random.sample(range(plan.captions), min(count, plan.captions))
    chosen = [read_captions(run / "captions.parquet", row, 1)[0] for row in rows]
    images = remake(load(run, device), chosen)
    return [id for (id, _), row, made in zip(chosen, rows, images, strict=True) if made != stored_images(run, plan, row)]


def main(argv: list[str]) -> int:
    """Audit runs; 0 where all is well, 1 where something is broken."""
    config = parse(AuditConfig, argv, prog="audit.py", about="Verify generated datasets.", positional="runs")
    if not config.runs:
        raise UsageError("which run? python generation/audit.py RUN")
    from generation.captions import read_captions
    from generation.plan import load_plan
    from stablerep.data.shards import shard_name

    wrong = 0
    for name in config.runs:
        run = Path(name)
        plan = load_plan(run)
        broken = []
        for number in range(plan.shards):
            problem = check_shard(run, number, read_captions(run / "captions.parquet", *plan.rows(number)))
            if problem:
                broken.append(number)
                print(f"{run}: shard {shard_name(number)}: {problem}")
        if broken and config.repair:
            (run / "dataset.json").unlink(missing_ok=True)
            for number in broken:
                (run / "shards" / f"{shard_name(number)}.json").unlink(missing_ok=True)
            print(f"{run}: {len(broken)} shards forgotten; the same generate command makes them again")
        complete = (run / "dataset.json").exists()
        differing = differing_captions(run, config.remake, config.device) if config.remake and complete else []
        for id in differing:
            print(f"{run}: caption {id}: remade images differ")
        wrong += len(broken) + len(differing)
        if not broken and not differing:
            state = "complete" if complete else "no dataset.json yet"
            print(f"{run}: {plan.shards} shards, {plan.images} images, all sound ({state})")
    return 1 if wrong else 0


if __name__ == "__main__":
    run_command(main)
