"""The plan: captions frozen and cut into shards, settings frozen and hashed, before anything is submitted."""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from generation.captions import CaptionCounts, expand, prepare
from stablerep.data.shards import read_sidecar, shard_name
from stablerep.runtime.config import from_yaml, key, to_dict, to_yaml
from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import REPO, read_json, write_atomic, write_json

TINY = REPO / "assets" / "tiny"


@dataclass
class GenerateConfig:
    """What is generated. Every key but the last two decides pixels and is frozen with the plan."""

    captions: list[str] = key([], "caption files or globs: txt, csv, tsv, jsonl, parquet, each also .gz or .zst")
    out: str = key("", "the run folder")
    model: str = key("tiny", "tiny (the embedded pipeline), a diffusers Stable Diffusion folder, or a hub id")
    revision: str | None = key(None, "hub revision (a commit, so that the weights are pinned)")
    images_per_caption: int = key(6, "images a caption")
    guidance_scale: float = key(2.0, "classifier-free guidance; 1 is none")
    steps: int = key(12, "DDIM steps")
    seed: int = key(0, "the noise of an image is a pure function of seed, caption id and image number")
    resolution: int | None = key(None, "generated size in pixels (default: what the model was trained for)")
    image_size: int | None = key(None, "stored size in pixels (default: the generated size)")
    dtype: str = key("auto", "auto (fp16 on GPUs, fp32 on CPUs) | fp32 | fp16 | bf16")
    attention: str = key("auto", "auto (xformers where it runs, else sdpa) | xformers | sdpa")
    batch_size: int = key(16, "images a UNet call (twice that with guidance)")
    jpeg_quality: int = key(95, "JPEG quality, 1 to 100")
    caption_column: str | None = key(None, "column of the captions (default: caption, text, ...)")
    limit: int | None = key(None, "only the first N captions by id: an unbiased subset")
    captions_per_shard: int = key(64, "captions a shard: one or two minutes of one GPU")
    lease_timeout_s: float = key(120.0, "a worker silent for this long loses its shard to another")
    attempts: int = key(3, "a shard that fails this often is set aside with its reason")


FREE = {"out", "captions", "lease_timeout_s", "attempts"}  # may change between two launches of one run


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

    def rows(self, shard: int) -> tuple[int, int]:
        """First caption and number of captions of a shard."""
        start = shard * self.captions_per_shard
        return start, min(self.captions_per_shard, self.captions - start)


def check(config: GenerateConfig) -> None:
    """Raise UsageError on a value that cannot work."""
    if not config.out:
        raise UsageError("--out RUN is missing: the folder that the run goes to")
    for name in ("images_per_caption", "steps", "batch_size", "captions_per_shard", "attempts"):
        if getattr(config, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
    for name, values in (("dtype", ("auto", "fp32", "fp16", "bf16")), ("attention", ("auto", "xformers", "sdpa"))):
        if getattr(config, name) not in values:
            raise UsageError(f"--{name} {getattr(config, name)} is none of {', '.join(values)}")
    if config.limit is not None and config.limit < 1:
        raise UsageError("--limit must be at least 1")
    if config.lease_timeout_s <= 0:
        raise UsageError("--lease-timeout-s must be positive")


def resolve(config: GenerateConfig, gpus: int) -> GenerateConfig:
    """Replace what depends on this machine by what the run will use: model folder, dtype. Downloads a hub model once."""
    check(config)
    if config.dtype == "auto":
        config.dtype = "fp16" if gpus else "fp32"
    path = TINY if config.model == "tiny" else Path(config.model).expanduser()
    if (path / "model_index.json").exists():
        config.model = str(path.resolve())
    elif path.exists() or config.model.count("/") != 1:
        raise UsageError(f"--model {config.model} is neither a diffusers folder (with model_index.json) nor a hub id")
    else:
        from huggingface_hub import snapshot_download

        try:
            config.model = snapshot_download(
                config.model, revision=config.revision, ignore_patterns=["*.ckpt", "*.bin", "*.msgpack", "*.onnx*"]
            )
        except Exception as error:  # the hub's client raises many kinds; all mean the same to the user
            raise UsageError(
                f"cannot fetch model {config.model} from the hub ({type(error).__name__}): "
                "give a folder, or fetch it where there is a network"
            ) from None
    return config


def fingerprint(folder: Path) -> str:
    """Hash of the names and sizes of a model folder's weights and of the text of its configs."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in (".json", ".safetensors", ".txt")):
        digest.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode())
        if file.suffix == ".json" and file.stat().st_size < 1 << 20:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def plan_hash(config: GenerateConfig, captions_sha256: str) -> str:
    """Hash of everything that decides pixels."""
    fixed = {k: v for k, v in to_dict(config).items() if k not in FREE | {"model", "limit", "caption_column"}}
    fixed |= {"model": fingerprint(Path(config.model)), "captions": captions_sha256}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def make_plan(config: GenerateConfig, write: bool) -> tuple[Plan, CaptionCounts]:
    """Read the captions and make the plan; with `write`, freeze both (and the config) in the run folder.

    Raises UsageError, having written nothing.
    """
    if not config.captions:
        raise UsageError("--captions FILE is missing: a list of captions (txt, csv, tsv, jsonl, parquet)")
    expand(config.captions)
    run = Path(config.out)
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "captions.parquet"
        counts = prepare(config.captions, config.caption_column, config.limit, target, Path(scratch) / "spill")
        data_hash = _file_hash(target)
        images = counts.kept * config.images_per_caption
        plan = Plan(
            captions=counts.kept,
            images=images,
            shards=-(-counts.kept // config.captions_per_shard),
            images_per_caption=config.images_per_caption,
            captions_per_shard=config.captions_per_shard,
            hash=plan_hash(config, data_hash),
            captions_sha256=data_hash,
            dropped={"empty": counts.empty, "duplicates": counts.duplicates},
            megabytes=round(images * _image_bytes(config) / 1e6, 1),
        )
        if write:
            (run / "shards").mkdir(parents=True, exist_ok=True)
            with open(target, "rb") as source, open(run / ".captions.tmp", "wb") as copy:
                shutil.copyfileobj(source, copy)
                copy.flush()
                os.fsync(copy.fileno())
            os.replace(run / ".captions.tmp", run / "captions.parquet")
            write_atomic(run / "config.yaml", to_yaml(config))
            write_json(run / "plan.json", vars(plan))  # last: a folder with plan.json is a planned run
    return plan, counts


def load_plan(run: Path) -> Plan:
    """Read a run's plan. Raises UsageError where there is none."""
    if not (run / "plan.json").exists():
        raise UsageError(f"{run} is not a generation run: it has no plan.json")
    return Plan(**read_json(run / "plan.json"))


def check_resume(config: GenerateConfig) -> None:
    """Raise UsageError, naming each key, where a run exists that was planned with other pixels."""
    run = Path(config.out)
    old, new = to_dict(from_yaml(GenerateConfig, run / "config.yaml")), to_dict(config)
    changed = [f"{k} {old[k]} -> {new[k]}" for k in new if k not in FREE and old[k] != new[k]]
    if config.captions and [str(Path(c).resolve()) for c in config.captions] != [
        str(Path(c).resolve()) for c in old["captions"]
    ]:
        changed.append(f"captions {' '.join(old['captions'])} -> {' '.join(config.captions)}")
    if changed:
        raise UsageError(f"{run} was planned with other settings ({'; '.join(changed)}): use another --out")


def finished_shards(run: Path, plan: Plan) -> int:
    """How many shards have their sidecar (one listing of the folder)."""
    try:
        names = set(os.listdir(run / "shards"))
    except FileNotFoundError:
        return 0
    return sum(f"{shard_name(k)}.json" in names for k in range(plan.shards))


def write_dataset(run: Path, plan: Plan, config: GenerateConfig) -> None:
    """Write dataset.json (also a wids index) from the sidecars; the content is the same whoever writes it.

    Raises UsageError where a shard's sidecar is missing.
    """
    shards = []
    for k in range(plan.shards):
        sidecar = read_sidecar(run / "shards", k)
        if sidecar is None:
            raise UsageError(f"shard {shard_name(k)} of {run} is missing or torn: the same generate command makes it again")
        shards.append(
            {"url": f"shards/{shard_name(k)}.tar", "nsamples": sidecar["samples"], "filesize": sidecar["size"],
             "sha256": sidecar["sha256"], "images": sidecar["images"]}
        )  # fmt: skip
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
            "model": Path(config.model).name,
            "guidance_scale": config.guidance_scale,
            "seed": config.seed,
            "shardlist": shards,
        },
    )


def _image_bytes(config: GenerateConfig) -> float:
    """Rough size of a stored JPEG: 1.2 bits a pixel at quality 95 of photographs, and 2.2 kB of tar and tables."""
    size = config.image_size or config.resolution or _native_size(Path(config.model))
    return 2200 + 0.15 * 1.6 * size * size


def _native_size(model: Path) -> int:
    unet, vae = read_json(model / "unet" / "config.json"), read_json(model / "vae" / "config.json")
    return int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)


def _file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def public_settings(config: GenerateConfig) -> dict[str, Any]:
    """The settings that go into every sample's JSON."""
    names = ("seed", "guidance_scale", "steps", "dtype", "revision")
    return {"model": Path(config.model).name, **{n: getattr(config, n) for n in names}}
