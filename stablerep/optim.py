"""AdamW groups and the learning rate, a pure function of the step."""

import math
from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices are decayed; biases, norms, CLS token and position embedding are not."""
    decayed: list[Any] = []
    free: list[Any] = []
    for name, p in model.named_parameters():
        small = p.ndim <= 1 or name.endswith(("cls_token", "pos_embed"))
        (free if small else decayed).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up to `peak`, then a cosine to zero; `step` counts from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
