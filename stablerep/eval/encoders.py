"""What can be scored: an encoder of ours (RUN or file), a timm model by path or by name, or a random initialisation."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stablerep import arch
from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import read_json


@dataclass
class Encoder:
    """A frozen encoder that takes pictures in [-1, 1] and gives one feature vector each."""

    name: str  # as given
    model: Any  # a timm model without classifier
    size: int  # pixels
    weights: str  # SHA-256 of the weights
    folder: Path | None  # where it lies: results and features go there; None for a timm name
    run: Path | None = None  # the training run
    facts: dict[str, Any] = field(default_factory=dict)  # method, arch, seed, step, as far as they are known


def open_encoder(name: str) -> Encoder:
    """Load `name`: a RUN, its final/ folder, a safetensors file with config.json beside, a folder as timm's on the hub
    (config.json, model.safetensors), or the name of a timm model, whose weights come from the hub. Raises UsageError."""
    place = Path(name)
    if not place.exists():
        return _from_hub(name)
    weights = _weights(place)
    description = _description(weights)
    model = _load(weights, description)
    run = _run(weights)
    facts = {"arch": description["architecture"], **(_facts(run) if run else {})}
    folder = run or (place.parent if place.is_file() else place)
    return Encoder(name, model, _size(model, description), digest(model), folder, run, facts)


def random_encoder(like: str, seed: int) -> Encoder:
    """A fresh initialisation, `random-<seed>`, of the architecture of `like`: a yardstick."""
    import torch

    place = Path(like)
    if not place.exists():
        raise UsageError(f"--random-encoders needs a first --checkpoint in a folder, and {like} is a name: set it to 0")
    description = _description(_weights(place))
    torch.manual_seed(1000 + seed)
    model = arch.create(description).eval()
    facts = {"method": "random", "arch": description["architecture"], "seed": seed, "step": 0}
    return Encoder(f"random-{seed}", model, _size(model, description), digest(model), None, None, facts)


def check_there(name: str) -> None:
    """Raise UsageError where a folder or file that is there holds no encoder: a glance, before a job is submitted."""
    if Path(name).exists():
        _weights(Path(name))


def digest(model: Any) -> str:
    """SHA-256 of a model's tensors and their names."""
    import torch

    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _weights(place: Path) -> Path:
    """The safetensors file of a RUN, folder or file. Raises UsageError."""
    folder = place.parent if place.is_file() else place / "final" if (place / "final").is_dir() else place
    named = [place] if place.is_file() else [folder / "encoder.safetensors", folder / "model.safetensors"]
    for path in named:
        if path.exists() and (folder / "config.json").exists():
            return path
    raise UsageError(f"{place} holds no finished encoder (final/encoder.safetensors and config.json)")


def _description(weights: Path) -> dict[str, Any]:
    """What config.json beside the weights says of the architecture. Raises UsageError."""
    path = weights.parent / "config.json"
    try:
        found = read_json(path)
    except ValueError as error:
        raise UsageError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(found, dict) or "architecture" not in found:
        raise UsageError(f"{path} names no `architecture`")
    return {"model_args": {}, **found, "num_classes": 0}


def _size(model: Any, description: dict[str, Any]) -> int:
    return int(description["model_args"].get("img_size") or model.patch_embed.img_size[0])


def _load(weights: Path, description: dict[str, Any]) -> Any:
    if "pretrained_cfg" not in description:  # ours
        return arch.load_weights(arch.create(description), weights)
    import timm

    try:
        model = timm.create_model(
            description["architecture"], pretrained=True, num_classes=0, **description["model_args"],
            pretrained_cfg_overlay={**description["pretrained_cfg"], "file": str(weights)},
        )  # fmt: skip
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        raise UsageError(f"{weights} does not fit its config.json: {str(error).splitlines()[0]}") from None
    return _in_our_range(model).eval()


def _from_hub(name: str) -> Encoder:
    import timm

    if not timm.is_model(name):
        raise UsageError(f"--checkpoint {name} is neither a run, a folder, a safetensors file nor a model of timm")
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # the hub's client raises many kinds; all mean the same to the user
        raise UsageError(
            f"--checkpoint {name}: its weights cannot be fetched from the hub ({type(error).__name__}); where there is a "
            "network, fetch config.json and model.safetensors from its page on huggingface.co/timm and give their folder"
        ) from None
    model = _in_our_range(model).eval()
    return Encoder(name, model, model.patch_embed.img_size[0], digest(model), None, None, {"arch": name})


def _in_our_range(model: Any) -> Any:
    """Fold timm's normalisation, (x - mean) / std of pictures in [0, 1], into the patch embedding, so that the model takes
    pictures in [-1, 1] like all encoders here: W x' + b with x' = ((x + 1) / 2 - mean) / std. Exact: nothing is padded."""
    import timm.data
    import torch

    projection = getattr(getattr(model, "patch_embed", None), "proj", None)
    if not isinstance(projection, torch.nn.Conv2d) or projection.bias is None or any(projection.padding):
        raise UsageError("only ViTs whose first layer cuts patches can be scored")
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        projection.bias += (projection.weight * (0.5 - mean) / std).sum((1, 2, 3))
        projection.weight /= 2 * std
    return model


def _run(weights: Path) -> Path | None:
    """The training run that weights in RUN/final belong to."""
    run = weights.resolve().parents[1]
    return run if weights.resolve().parent.name == "final" and (run / "train.json").exists() else None


def _facts(run: Path) -> dict[str, Any]:
    import yaml

    config = yaml.safe_load((run / "config.yaml").read_text())
    return {"step": read_json(run / "train.json")["steps"], **{k: config[k] for k in ("method", "arch", "seed") if k in config}}
