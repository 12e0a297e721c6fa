"""Training methods, one file each, on one small interface."""

from stablerep.methods.base import Method
from stablerep.runtime.errors import UsageError

NAMES = ("stablerep", "simclr")


def method_class(name: str) -> type[Method]:
    """The class of a method. Raises UsageError."""
    if name == "stablerep":
        from stablerep.methods.stablerep import StableRep

        return StableRep
    if name == "simclr":
        from stablerep.methods.simclr import SimCLR

        return SimCLR
    raise UsageError(f"--method {name} is none of {', '.join(NAMES)}")
