"""Training methods, one file each, on one small interface."""

from importlib import import_module
from typing import TYPE_CHECKING

from stablerep.runtime.errors import UsageError

if TYPE_CHECKING:
    from stablerep.methods.base import Method

CLASSES = {
    "stablerep": "StableRep", "stablerep_plus": "StableRepPlus", "simclr": "SimCLR", "clip": "CLIP", "mae": "MAE",
    "byol": "BYOL", "mocov3": "MoCoV3", "dino": "DINO",
}  # fmt: skip


def method_class(name: str) -> "type[Method]":
    """The class of a method. Raises UsageError."""
    if name not in CLASSES:
        raise UsageError(f"--method {name} is none of {', '.join(CLASSES)}")
    found: type[Method] = getattr(import_module(f"stablerep.methods.{name}"), CLASSES[name])
    return found
