"""AdamW groups; learning rate and weight decay, pure functions of the step."""

import math
from typing import Any

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices are decayed; biases, norms, CLS token and position embedding are not."""
    decayed: list[Any] = []
    free: list[Any] = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        small = p.ndim <= 1 or name.endswith(("cls_token", "pos_embed", "positional_embedding"))
        (free if small else decayed).append(p)
    return [
        {"params": decayed, "weight_decay": weight_decay, "decays": True},
        {"params": free, "weight_decay": 0.0, "decays": False},
    ]


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up to `peak`, then a cosine to zero; `step` counts from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def weight_decay(step: int, steps: int, start: float, end: float | None) -> float:
    """From `start` to `end` along half a cosine (DINO, arXiv 2104.14294, section 3.2); constant where `end` is None."""
    return start if end is None else end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / steps))


class ReproducibleAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2) in elementary operations, each rounded on its own.

    torch's kernels fuse multiplications with additions in vectors but not in the rest of a tensor, so that an element's
    last bit depends on where the optimizer's partition puts it, and with it on the number of ranks. Here it does not.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient; state names are AdamW's."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                t, mean, square = float(state["step"]), state["exp_avg"], state["exp_avg_sq"]
                mean.mul_(beta1).add_(p.grad * (1 - beta1))
                square.mul_(beta2).add_((p.grad * p.grad).mul_(1 - beta2))
                denominator = (square / (1 - beta2**t)).sqrt_().add_(group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_((mean / (1 - beta1**t)).div_(denominator).mul_(group["lr"]))
