"""The plan: captions frozen and cut into shards, settings frozen and hashed, before anything is submitted."""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from generation.caption_files import expand
from generation.captions import CaptionCounts, prepare
from generation.settings import GenerateConfig, fingerprint, image_bytes, model_name
from stablerep.runtime.config import from_yaml, to_dict, to_yaml
from stablerep.runtime.errors import UsageError, WorkError
from stablerep.runtime.rundir import file_hash, read_json, write_atomic, write_json

FREE = {"out", "captions", "lease_timeout_s", "attempts"}  # may change between two launches of one run
READERS = 8  # threads that read sidecars


@dataclass
class Plan:
    """What `plan.json` holds."""

    captions: int
    images: int
    shards: int
    images_per_caption: int
    captions_per_shard: int
    hash: str
    captions_sha256: str
    dropped: dict[str, int]
    megabytes: float
    sources_sha256: str  # of the caption files as they were
    model_sha256: str | None = None  # the fingerprint of the model's folder; None in runs of older versions
    estimate: dict[str, Any] | None = None  # what the launch that planned it expected: fields of generation.cost.Estimate

    def rows(self, shard: int) -> tuple[int, int]:
        """First caption and number of captions of a shard."""
        start = shard * self.captions_per_shard
        return start, min(self.captions_per_shard, self.captions - start)


def plan_hash(config: GenerateConfig, model_sha256: str, captions_sha256: str) -> str:
    """Hash of everything that decides pixels."""
    fixed = {k: v for k, v in to_dict(config).items() if k not in FREE | {"model", "limit", "caption_column"}}
    fixed |= {"model": model_sha256, "captions": captions_sha256}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def make_plan(
    config: GenerateConfig, write: bool, cost: Callable[[Plan], dict[str, Any]] | None = None
) -> tuple[Plan, CaptionCounts]:
    """Read the captions and make the plan; with `write`, freeze both (and the config) in the run folder.

    The captions are sorted in TMPDIR. `cost` gives the plan's estimate. Raises UsageError (bad captions) or WorkError
    (a full disk); then nothing is planned.
    """
    if not config.captions:
        raise UsageError("--captions FILE is missing: a list of captions (txt, csv, tsv, jsonl, parquet)")
    run = Path(config.out)
    fresh = not run.exists()
    with tempfile.TemporaryDirectory() as scratch:
        # In the run folder from the first byte on: gigabytes are written once.
        target = (run if write else Path(scratch)) / f".captions.{os.uname().nodename}.{os.getpid()}.tmp"
        try:
            plan, counts = _plan(config, target, Path(scratch) / "spill")
            plan.estimate = cost(plan) if cost else None
            if write:
                with open(target, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(target, run / "captions.parquet")
                write_atomic(run / "config.yaml", to_yaml(config))
                write_json(run / "plan.json", vars(plan))  # last: a folder with plan.json is a planned run
        except BaseException as error:
            target.unlink(missing_ok=True)
            if fresh:
                with suppress(OSError):  # not there, or not ours alone
                    run.rmdir()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise WorkError(f"no room for the captions in {target.parent}: nothing is planned yet") from None
            raise
    return plan, counts


def _plan(config: GenerateConfig, target: Path, spill: Path) -> tuple[Plan, CaptionCounts]:
    counts = prepare(config.captions, config.caption_column, config.limit, target, spill)
    data_hash, model_hash = file_hash(target), fingerprint(Path(config.model))
    images = counts.kept * config.images_per_caption
    plan = Plan(
        captions=counts.kept,
        images=images,
        shards=-(-counts.kept // config.captions_per_shard),
        images_per_caption=config.images_per_caption,
        captions_per_shard=config.captions_per_shard,
        hash=plan_hash(config, model_hash, data_hash),
        captions_sha256=data_hash,
        dropped={"empty": counts.empty, "duplicates": counts.duplicates},
        megabytes=round(images * image_bytes(config) / 1e6, 1),
        sources_sha256=_files_hash(expand(config.captions)),
        model_sha256=model_hash,
    )
    return plan, counts


def load_plan(run: Path) -> Plan:
    """Read a run's plan. Raises UsageError where there is none."""
    if not (run / "plan.json").exists():
        raise UsageError(f"{run} is not a generation run: it has no plan.json")
    return Plan(**read_json(run / "plan.json"))


def check_folder(run: Path) -> None:
    """Raise UsageError where `run` holds anything but logs and what an interrupted `make_plan` leaves."""
    ours = {"logs", "captions.parquet", "config.yaml"}
    if run.exists() and any(p.name not in ours and not p.name.endswith(".tmp") for p in run.iterdir()):
        raise UsageError(f"{run} exists and is not a generation run: choose another --out")


def check_resume(config: GenerateConfig) -> None:
    """Raise UsageError, naming each key, where a run exists that was planned with other pixels."""
    run = Path(config.out)
    old, new = to_dict(from_yaml(GenerateConfig, run / "config.yaml")), to_dict(config)
    changed = [f"{k} {old[k]} -> {new[k]}" for k in new if k not in FREE and old[k] != new[k]]
    if changed:
        raise UsageError(f"{run} was planned with other settings ({'; '.join(changed)}): use another --out")
    plan = load_plan(run)
    check_model(config, plan)
    if config.captions and _files_hash(expand(config.captions)) != plan.sources_sha256:
        raise UsageError(
            f"{' '.join(config.captions)}: not the captions that {run} was planned with; use another --out for these, "
            "or leave --captions out to go on with the frozen ones"
        )


def check_model(config: GenerateConfig, plan: Plan) -> None:
    """Raise UsageError where the model's folder is not as it was when the run was planned."""
    if plan.model_sha256 not in (None, fingerprint(Path(config.model))):
        raise UsageError(
            f"{config.model} is not the model that {config.out} was planned with: its files have changed; "
            "put them back, or use another --out"
        )


def renew(config: GenerateConfig) -> None:
    """Let a planned run's next workers use this launch's settings of how to work; those of what to make stay frozen."""
    path = Path(config.out) / "config.yaml"
    frozen = from_yaml(GenerateConfig, path)
    write_atomic(path, to_yaml(replace(frozen, lease_timeout_s=config.lease_timeout_s, attempts=config.attempts)))


def missing_shards(run: Path, plan: Plan) -> list[int]:
    """The shards without a sidecar, in order (one listing of the folder)."""
    from stablerep.data.shards import shard_name

    try:
        names = set(os.listdir(run / "shards"))
    except FileNotFoundError:
        names = set()
    return [k for k in range(plan.shards) if f"{shard_name(k)}.json" not in names]


def finished_shards(run: Path, plan: Plan) -> int:
    """How many shards have their sidecar (one listing of the folder)."""
    try:
        return min(plan.shards, sum(name.endswith(".json") for name in os.listdir(run / "shards")))
    except FileNotFoundError:
        return 0


def write_dataset(run: Path, plan: Plan, config: GenerateConfig) -> list[int]:
    """Write dataset.json (also a wids index) from the sidecars; the content is the same whoever writes it.

    Returns the shards that are missing or torn; where there are any, nothing is written.
    """
    with ThreadPoolExecutor(READERS) as readers:  # a file server answers many questions at once
        found = list(readers.map(lambda k: _shard_entry(run, k), range(plan.shards)))
    shards = [entry for entry in found if entry is not None]
    if len(shards) < plan.shards:
        return [k for k, entry in enumerate(found) if entry is None]
    write_json(
        run / "dataset.json",
        {
            "__kind__": "wids-shard-index-v1",
            "wids_version": 1,
            "name": run.resolve().name,
            "captions": plan.captions,
            "images": plan.images,
            "images_per_caption": plan.images_per_caption,
            "bytes": sum(s["filesize"] for s in shards),
            "plan_hash": plan.hash,
            "model": model_name(config.model),
            "guidance_scale": config.guidance_scale,
            "seed": config.seed,
            "shardlist": shards,
        },
    )
    return []


def _shard_entry(run: Path, shard: int) -> dict[str, Any] | None:
    """A shard in dataset.json; None where it is missing or torn."""
    from stablerep.data.shards import read_sidecar, shard_name

    sidecar = read_sidecar(run / "shards", shard)
    if sidecar is None:
        return None
    return {
        "url": f"shards/{shard_name(shard)}.tar", "nsamples": sidecar["samples"], "filesize": sidecar["size"],
        "sha256": sidecar["sha256"], "images": sidecar["images"],
    }  # fmt: skip


def _files_hash(files: list[str]) -> str:
    """One hash of the contents of several files, in order; their names do not count."""
    return hashlib.sha256(" ".join(map(file_hash, files)).encode()).hexdigest()
