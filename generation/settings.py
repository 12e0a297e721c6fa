"""What is generated: the settings, checked, and resolved to what this machine has."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stablerep.runtime.config import key
from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import data_folder, read_json

TINY = data_folder("assets") / "tiny"
PIECES, PIECE = 64, 1 << 16  # that a fingerprint reads of each file, evenly spaced, and bytes of each
CHOICES = {
    "sampler": ("ddim", "dpmsolver++", "unipc"),
    "dtype": ("auto", "fp32", "fp16", "bf16"),
    "attention": ("auto", "xformers", "sdpa"),
    "compile": ("auto", "on", "off"),
}


@dataclass
class GenerateConfig:
    """What is generated. Every key but the last two decides pixels and is frozen with the plan."""

    captions: list[str] = key([], "caption files or globs: txt, csv, tsv, jsonl, parquet, each also .gz or .zst")
    out: str = key("", "the run folder")
    model: str = key("tiny", "tiny (the embedded pipeline), a diffusers Stable Diffusion folder, or a hub id")
    revision: str | None = key(None, "hub revision (a commit, so that the weights are pinned)")
    images_per_caption: int = key(6, "images a caption")
    guidance_scale: float = key(2.0, "classifier-free guidance; 1 is none")
    sampler: str = key("ddim", "ddim | dpmsolver++ | unipc; no other: their images depend on nothing but the first noise")
    steps: int = key(12, "sampler steps")
    seed: int = key(0, "the noise of an image is a pure function of seed, caption id and image number")
    resolution: int | None = key(None, "generated size in pixels (default: what the model was trained for)")
    image_size: int | None = key(None, "stored size in pixels (default: the generated size)")
    dtype: str = key("auto", "auto (fp16 on GPUs, fp32 on CPUs) | fp32 | fp16 | bf16")
    attention: str = key("auto", "auto (the faster on a GPU, measured in seconds there) | xformers | sdpa")
    batch_size: int | str = key(16, "images a UNet call (twice that with guidance), or auto: as many as fit and make it faster")
    vae_batch_size: int = key(16, "images a call of the autoencoder, at most a UNet call's")
    compile: str = key("auto", "torch.compile and CUDA graphs for the UNet: auto (on a GPU, where that pays) | on | off")
    jpeg_quality: int = key(95, "JPEG quality, 1 to 100")
    caption_column: str | None = key(None, "column of the captions (default: caption, text, ...)")
    limit: int | None = key(None, "only the first N captions by id: an unbiased subset")
    captions_per_shard: int = key(64, "captions a shard: one or two minutes of one GPU")
    lease_timeout_s: float = key(120.0, "a worker silent for this long loses its shard to another")
    attempts: int = key(3, "a node gives a shard up that failed this often there, or on so many nodes")


def check(config: GenerateConfig) -> None:
    """Raise UsageError on a value that cannot work."""
    if not config.out:
        raise UsageError("--out RUN is missing: the folder that the run goes to")
    if isinstance(config.batch_size, str) and config.batch_size.isdecimal():
        config.batch_size = int(config.batch_size)  # from a command line
    if isinstance(config.batch_size, str) and config.batch_size != "auto":
        raise UsageError(f"--batch-size {config.batch_size} is neither a number nor auto")
    for name in ("images_per_caption", "steps", "batch_size", "vae_batch_size", "captions_per_shard", "attempts"):
        value = getattr(config, name)
        if isinstance(value, int) and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
    for name, values in CHOICES.items():
        if getattr(config, name) not in values:
            raise UsageError(f"--{name} {getattr(config, name)} is none of {', '.join(values)}")
    if config.limit is not None and config.limit < 1:
        raise UsageError("--limit must be at least 1")
    if config.lease_timeout_s <= 0:
        raise UsageError("--lease-timeout-s must be positive")
    if config.steps > 1000:
        raise UsageError("--steps must be at most 1000, the steps that the model's noise schedule has")
    if not 1 <= config.jpeg_quality <= 100:
        raise UsageError("--jpeg-quality must be from 1 to 100")
    if config.image_size is not None and config.image_size < 1:
        raise UsageError("--image-size must be at least 1")


def resolve(config: GenerateConfig, gpus: int) -> GenerateConfig:
    """Replace what depends on this machine by what the run will use: model folder, dtype. Downloads a hub model once."""
    check(config)
    config.dtype = own_dtype(config.dtype, gpus)
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
            config.revision = Path(config.model).name  # the commit that the name meant today
        except Exception as error:  # the hub's client raises many kinds; all mean the same to the user
            raise UsageError(
                f"cannot fetch model {config.model} from the hub ({type(error).__name__}): "
                "give a folder, or fetch it where there is a network"
            ) from None
    if not (Path(config.model) / "unet" / "config.json").exists():
        raise UsageError(f"--model {config.model} is not a Stable Diffusion pipeline: it has no unet/config.json")
    scale = _scale(Path(config.model))
    if config.resolution is not None and (config.resolution < 1 or config.resolution % scale):
        raise UsageError(f"--resolution {config.resolution} is not a multiple of {scale}")
    return config


def own_dtype(dtype: str, gpus: int) -> str:
    """What `auto` stands for."""
    return dtype if dtype != "auto" else "fp16" if gpus else "fp32"


def model_here(model: str, revision: str | None = None) -> str | None:
    """The folder of a model that is on this machine; None where a hub id was not fetched. Raises UsageError."""
    path = TINY if model == "tiny" else Path(model).expanduser()
    if path.exists() or model.count("/") != 1:
        if not (path / "model_index.json").exists():
            raise UsageError(f"--model {model} is neither a diffusers folder (with model_index.json) nor a hub id")
        return str(path.resolve())
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return str(snapshot_download(model, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def fingerprint(folder: Path) -> str:
    """Hash of a model folder: names and sizes of its files, and PIECES of each, which is all of a small one.

    Weights of gigabytes are not read whole, but a training step or a merge changes nearly every piece of them.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in (".json", ".safetensors", ".txt")):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        with open(path, "rb") as file:
            for start in range(0, size, max(PIECE, size // PIECES)):
                file.seek(start)
                digest.update(file.read(PIECE))
    return digest.hexdigest()


def public_settings(config: GenerateConfig) -> dict[str, Any]:
    """The settings that go into every sample's JSON."""
    names = ("seed", "guidance_scale", "sampler", "steps", "dtype", "revision")
    return {"model": model_name(config.model), **{n: getattr(config, n) for n in names}}


def image_bytes(config: GenerateConfig) -> float:
    """Rough size of a stored JPEG: 1.2 bits a pixel at quality 95 of photographs, and 2.2 kB of tar and tables."""
    size = config.image_size or generated_size(config)
    return 2200 + 0.15 * 1.6 * size * size


def generated_size(config: GenerateConfig) -> int:
    """Pixels of a generated image, each way; of a model that is a folder, or with `resolution`."""
    model = Path(config.model)
    return config.resolution or int(read_json(model / "unet" / "config.json")["sample_size"]) * _scale(model)


def _scale(model: Path) -> int:
    """Pixels a latent cell, each way."""
    levels: int = len(read_json(model / "vae" / "config.json")["block_out_channels"])
    return 1 << (levels - 1)


def model_name(model: str) -> str:
    """A folder's name, or the hub id that its place in the hub's cache (models--OWNER--NAME) stands for."""
    hub = [p for p in Path(model).parts if p.startswith("models--")]
    return hub[-1].removeprefix("models--").replace("--", "/") if hub else Path(model).name
