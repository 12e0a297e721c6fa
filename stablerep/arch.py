"""Encoders: timm ViTs by short names, saved so that timm loads them."""

import re
from pathlib import Path
from typing import Any

from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import read_json, write_atomic, write_json

ALIASES = {f"vit_{size}": f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")}
MICRO = {"embed_dim": 128, "depth": 4, "num_heads": 4}  # the demo's encoder: 0.8 M parameters, 16 patches a picture


def describe(arch: str, image_size: int) -> dict[str, Any]:
    """The timm model and its arguments: `vit_micro`, a short name (vit_large = ViT-L/16) or any timm ViT.

    Pictures up to 64 px are cut into 4 px patches where the name is a short one, and into 4 x 4 patches for `vit_micro`.
    """
    name = ALIASES.get(arch, "vit_tiny_patch16_224" if arch == "vit_micro" else arch)
    args: dict[str, Any] = {"img_size": image_size}
    if arch == "vit_micro":
        args |= {**MICRO, "patch_size": max(1, image_size // 4)}
    elif name != arch and image_size <= 64:
        args["patch_size"] = 4
    return {"architecture": name, "num_classes": 0, "model_args": args}


def patch_size(arch: str, image_size: int) -> int:
    """Pixels of a patch's side, from the name of the model."""
    described = describe(arch, image_size)
    named = re.search(r"patch(\d+)", described["architecture"])
    return int(described["model_args"].get("patch_size") or (named[1] if named else 1))


def create(description: dict[str, Any]) -> Any:
    """A randomly initialised timm model without classifier. Raises UsageError on a name or size that does not fit."""
    import timm

    try:
        return timm.create_model(
            description["architecture"], num_classes=description["num_classes"], **description["model_args"]
        )
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise UsageError(f"--arch {description['architecture']} does not work: {str(error).splitlines()[0]}") from None


def sincos_positions(height: int, width: int, dim: int) -> Any:
    """Sine-cosine positions [1 + height * width, dim] of a grid of patches, float32 (MoCo v3 and MAE): zeros for the CLS
    token, then row by row, a quarter of `dim` each for sin x, cos x, sin y, cos y at frequencies 10000^(-4k / dim)."""
    import torch

    omega = 10000.0 ** (-4 * torch.arange(dim // 4, dtype=torch.float64) / dim)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x_angle, y_angle = x.reshape(-1, 1) * omega, y.reshape(-1, 1) * omega
    patches = torch.cat([x_angle.sin(), x_angle.cos(), y_angle.sin(), y_angle.cos()], 1)
    return torch.cat([torch.zeros(1, dim), patches.float()])


def accept_other_sizes(encoder: Any) -> None:
    """Let a timm ViT take pictures of any multiple of its patch, with interpolated positions (timm's `dynamic_img_size`)."""
    from timm.layers.format import Format

    encoder.dynamic_img_size = True
    patches = encoder.patch_embed
    patches.strict_img_size, patches.flatten, patches.output_fmt = False, False, Format.NHWC


def save_final(folder: Path, description: dict[str, Any], parts: dict[str, dict[str, Any]]) -> None:
    """Write config.json and each part's tensors as PART.safetensors, the encoder last: where encoder.safetensors exists,
    all is there. Raises OSError."""
    from safetensors.torch import save

    write_json(folder / "config.json", description)
    for part in sorted(parts, key=lambda name: name == "encoder"):
        write_atomic(folder / f"{part}.safetensors", save({k: v.contiguous() for k, v in parts[part].items()}))


def final_folder(path: str) -> Path:
    """The folder of config.json and safetensors that a RUN, its `final/` folder or a file in it stands for."""
    place = Path(path)
    return place.parent if place.is_file() else place / "final" if (place / "final").is_dir() else place


def load_encoder(path: str) -> Any:
    """Load an encoder from a RUN folder, its `final/` folder or the safetensors file. Raises UsageError."""
    folder = final_folder(path)
    weights = folder / "encoder.safetensors"
    if not weights.exists() or not (folder / "config.json").exists():
        raise UsageError(f"{path} holds no finished encoder (final/encoder.safetensors and config.json)")
    return load_weights(create(read_json(folder / "config.json")), weights)


def load_weights(model: Any, weights: Path) -> Any:
    """Fill a module from a safetensors file and put it in evaluation mode. Raises UsageError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(weights))
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise UsageError(f"{weights} does not fit its config.json: {str(error).splitlines()[0]}") from None
    return model.eval()
