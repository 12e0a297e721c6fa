"""Encoders: timm ViTs by short names, saved so that timm loads them."""

from pathlib import Path
from typing import Any

from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import read_json, write_atomic, write_json

ALIASES = {f"vit_{size}": f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")}
MICRO = {"embed_dim": 128, "depth": 4, "num_heads": 4}  # the demo's encoder: 0.8 M parameters


def describe(arch: str, image_size: int) -> dict[str, Any]:
    """The timm model and its arguments: `vit_micro`, a short name (vit_large = ViT-L/16) or any timm ViT.

    Pictures up to 64 px are cut into 4 px patches where the name is a short one.
    """
    name = ALIASES.get(arch, "vit_tiny_patch16_224" if arch == "vit_micro" else arch)
    args: dict[str, Any] = {"img_size": image_size}
    if arch == "vit_micro":
        args |= MICRO
    if name != arch and image_size <= 64:
        args["patch_size"] = 4
    return {"architecture": name, "num_classes": 0, "model_args": args}


def create(description: dict[str, Any]) -> Any:
    """A randomly initialised timm model without classifier. Raises UsageError on a name or size that does not fit."""
    import timm

    try:
        return timm.create_model(
            description["architecture"], num_classes=description["num_classes"], **description["model_args"]
        )
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise UsageError(f"--arch {description['architecture']} does not work: {str(error).splitlines()[0]}") from None


def save_final(folder: Path, description: dict[str, Any], parts: dict[str, dict[str, Any]]) -> None:
    """Write config.json and each part's tensors as PART.safetensors, the encoder last: where encoder.safetensors exists,
    all is there. Raises OSError."""
    from safetensors.torch import save

    write_json(folder / "config.json", description)
    for part in sorted(parts, key=lambda name: name == "encoder"):
        write_atomic(folder / f"{part}.safetensors", save({k: v.contiguous() for k, v in parts[part].items()}))


def load_encoder(path: str) -> Any:
    """Load an encoder from a RUN folder, its `final/` folder or the safetensors file. Raises UsageError."""
    from safetensors.torch import load_file

    place = Path(path)
    folder = place.parent if place.is_file() else place / "final" if (place / "final").is_dir() else place
    weights = folder / "encoder.safetensors"
    if not weights.exists() or not (folder / "config.json").exists():
        raise UsageError(f"{path} holds no finished encoder (final/encoder.safetensors and config.json)")
    model = create(read_json(folder / "config.json"))
    try:
        model.load_state_dict(load_file(weights))
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"{weights} does not fit its config.json: {str(error).splitlines()[0]}") from None
    return model.eval()
