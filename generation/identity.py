"""Identity: a caption is its text's hash, an image is (seed, caption id, j)."""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def caption_id(text: str) -> str:
    """The first 16 hex digits of the SHA-256 of the caption's UTF-8 text, stripped of white space at both ends."""
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def noise(seed: int, id: str, j: int, shape: tuple[int, ...]) -> "torch.Tensor":
    """Starting noise of image `j` of caption `id`: standard normal, float32, drawn on the CPU.

    A pure function of its arguments: it knows nothing of shard, batch, worker, node or restart.
    """
    import torch

    digest = hashlib.sha256(f"{seed}/{id}/{j}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(shape, generator=generator, dtype=torch.float32)
