"""Features of pictures under a frozen encoder."""

from typing import Any

import numpy as np
import torch


@torch.inference_mode()
def extract(encoder: Any, pictures: np.ndarray, device: str, batch: int = 250) -> np.ndarray:
    """CLS features float32 [N, D] of uint8 pictures [N, 3, S, S], scaled to [-1, 1] as in training."""
    encoder = encoder.to(device).eval()
    rows = [
        encoder(torch.from_numpy(pictures[i : i + batch]).to(device).float() / 127.5 - 1).float().cpu().numpy()
        for i in range(0, len(pictures), batch)
    ]
    return np.concatenate(rows)
