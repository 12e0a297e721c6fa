"""What is logged of a training run: metrics.jsonl first, TensorBoard and (if asked for) Weights & Biases beside it."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import append_jsonl

# Dense bf16/fp16 peaks of the makers' data sheets, FLOP/s, by a part of the device's name.
PEAKS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12, "A800": 312e12, "A40": 149.7e12,
    "A10": 125e12, "L40S": 362e12, "L4": 121e12, "V100": 125e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12, "T4": 65e12,
}  # fmt: skip


def peak_flops(device: torch.device) -> tuple[str, float | None]:
    """Name of the device and its peak in FLOP/s; None where no data sheet is known here (CPUs among them)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return name, next((peak for part, peak in PEAKS.items() if part in name), None)


def training_flops(model: Any, views: list[Tensor], tokens: Tensor | None) -> float:
    """FLOPs of a training step on these rows: three times the counted forward pass (the backward pass costs two), but once
    that of a `teacher`'s encoder; without what activation checkpointing computes again."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The counter knows matrix products, and not the CPU's fused attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(views, tokens)
    taught = counter.get_flop_counts().get(f"{type(model).__name__}.teacher.encoder", {})
    return 3.0 * counter.get_total_flops() - 2.0 * sum(taught.values())


class Metrics:
    """Lines of metrics.jsonl, written by rank 0; `wandb` names a Weights & Biases project."""

    def __init__(self, run: Path, wandb: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = run / "metrics.jsonl"
        self._board = SummaryWriter(str(run / "tensorboard"))
        self._wandb: Any = None
        if wandb:
            try:
                import wandb as client  # type: ignore[import-not-found,unused-ignore]
            except ImportError:
                raise UsageError("--wandb: the package wandb is not installed here (pip install wandb)") from None
            self._wandb = client.init(project=wandb, name=run.name, id=run.name, resume="allow", dir=str(run))

    def write(self, record: dict[str, Any], steps: int) -> None:
        """Log one record; `steps` is the length of the run, for the line that people read."""
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        record["time"] = time.time()
        append_jsonl(self.path, record)
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k not in ("step", "time")}
        for name, value in numbers.items():
            self._board.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=record["step"])
        eta = (steps - record["step"]) * record["seconds"] / max(1, record["steps"])
        loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
        rate = f"{record['images_per_s']:.0f} images/s  ETA {eta / 60:.0f} min"
        print(f"step {record['step']}/{steps}  loss {loss}  {rate}", flush=True)

    def close(self) -> None:
        """Flush."""
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
