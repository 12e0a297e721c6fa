"""Features of pictures under a frozen encoder: once a data set and encoder, then from a file. Ranks share the work."""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from stablerep.eval.datasets import Files, Labelled
from stablerep.eval.encoders import Encoder
from stablerep.runtime import dist
from stablerep.runtime.rundir import write_atomic

BATCH = 250


@torch.inference_mode()
def extract(encoder: Any, pictures: Any, device: str, batch: int = BATCH, workers: int = 0) -> np.ndarray:
    """CLS features float32 [N, D] of uint8 pictures [N, 3, S, S], scaled to [-1, 1] as in training; `Files` are read by
    `workers` processes."""
    encoder = encoder.to(device).eval()
    batches: Any = (torch.from_numpy(pictures[i : i + batch]) for i in range(0, len(pictures), batch))
    if isinstance(pictures, Files):
        batches = DataLoader(pictures, batch, num_workers=workers)  # type: ignore[arg-type]
    rows = [encoder(x.to(device, non_blocking=True).float() / 127.5 - 1).float().cpu().numpy() for x in batches]
    return np.concatenate(rows) if rows else np.zeros((0, encoder.num_features), np.float32)


class Features:
    """The features of one encoder, kept in `cache` under a hash of its weights and of the pictures."""

    def __init__(self, encoder: Encoder, cache: Path, device: str, workers: int) -> None:
        self.encoder, self.cache, self.device, self.workers = encoder, cache, device, workers
        self._held: dict[str, np.ndarray] = {}

    def of(self, split: Labelled) -> np.ndarray:
        """Float32 [N, D]. Collective where there are several ranks: each reads and encodes its share."""
        key = hashlib.sha256(f"{self.encoder.weights} {split.sha256}".encode()).hexdigest()[:32]
        if key not in self._held:
            self._held[key] = self._from_file_or_pictures(self.cache / f"{key}.npy", split)
        return self._held[key]

    def _from_file_or_pictures(self, path: Path, split: Labelled) -> np.ndarray:
        if not dist.broadcast(path.exists()):
            rank, world = dist.rank(), dist.world()
            rows = np.array_split(np.arange(len(split)), world)[rank]
            own = extract(self.encoder.model, split.take(rows).pictures, self.device, workers=self.workers)
            parts = [path.with_suffix(f".{r}-of-{world}.npy") for r in range(world)]
            _write(parts[rank], own)
            dist.barrier()
            if rank == 0:
                _write(path, np.concatenate([np.load(p) for p in parts]))
                for part in parts:
                    part.unlink()
            dist.barrier()
        return np.asarray(np.load(path))


def _write(path: Path, array: np.ndarray) -> None:
    """An .npy file, complete or absent."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    body: Any = memoryview(np.ascontiguousarray(array)).cast("B")  # type: ignore[arg-type]
    write_atomic(path, iter([header.getvalue(), body]))
