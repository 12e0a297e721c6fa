"""StableRep (arXiv 2306.00984): train an encoder on several generated images per caption."""

from typing import Any

__version__ = "0.1.0"


def load_encoder(path: str) -> Any:
    """Load a trained encoder as a timm model; `path` is a RUN folder, its `final/` folder or the safetensors file."""
    from stablerep.arch import load_encoder as load

    return load(path)
