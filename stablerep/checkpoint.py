"""Checkpoints that know no rank count: float32 parameters and Adam's moments by name, complete or absent.

Gathering leans on private names of DeepSpeed (pinned in requirements.txt; tests/test_train.py would notice a change).
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from stablerep.runtime import dist
from stablerep.runtime.errors import WorkError
from stablerep.runtime.rundir import read_json, sync_folder, write_atomic, write_json

KEPT = 2


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def complete_steps(run: Path) -> list[int]:
    """Steps with a complete checkpoint, oldest first."""
    return sorted(int(p.name.split("-")[1]) for p in (run / "checkpoints").glob("step-*") if (p / "state.json").exists())


def _relink(engine: Any) -> Any:
    # With several parameter groups DeepSpeed links optimizer states after the first group's step, too early.
    optimizer = engine.optimizer
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()
    return optimizer


def gather(engine: Any) -> dict[str, torch.Tensor]:
    """`param/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` in float32 on the CPU (rank 0; empty elsewhere). Collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    _relink(engine)
    tensors: dict[str, torch.Tensor] = {}
    for name, p in engine.module.named_parameters():
        values = {"param": safe_get_full_fp32_param(p)}
        values |= {key: safe_get_full_optimizer_state(p, key) for key in ("exp_avg", "exp_avg_sq")}
        if dist.rank() == 0:
            tensors |= {f"{key}/{name}": value.detach().float().cpu().contiguous() for key, value in values.items()}
    return tensors


def save(run: Path, engine: Any, step: int, keep_every: int) -> None:
    """Write the checkpoint of `step` (steps done). Collective; rank 0 writes: temporary folder, fsync, rename."""
    from safetensors.torch import save as encode

    tensors = gather(engine)
    problem = None
    if dist.rank() == 0:
        try:
            final = step_folder(run, step)
            temporary = final.with_name(f".{final.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            write_atomic(temporary / "tensors.safetensors", encode(tensors))
            write_json(temporary / "state.json", {"step": step})
            if final.exists():
                shutil.rmtree(final)
            os.rename(temporary, final)
            sync_folder(final.parent)
            _prune(run, keep_every)
        except OSError as error:
            problem = f"cannot save a checkpoint in {run}: {error.strerror}; older ones are kept"
    problem = dist.broadcast(problem)
    if problem:
        raise WorkError(problem)


def load_newest(run: Path, engine: Any) -> int:
    """Load the newest complete checkpoint and return its step; 0 where there is none. Rank 0 decides, all load."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
    from safetensors.torch import load_file

    steps = complete_steps(run) if dist.rank() == 0 else []
    step = int(dist.broadcast(steps[-1] if steps else 0))
    if step == 0:
        return 0
    folder = step_folder(run, step)
    tensors = load_file(folder / "tensors.safetensors")
    wanted = {f"param/{name}": p.shape for name, p in engine.module.named_parameters()}
    wrong = [n for n, shape in wanted.items() if n not in tensors or tensors[n].shape != shape]
    if wrong:
        raise WorkError(f"{folder} was saved by another model ({wrong[0]} does not fit): use another --out")
    optimizer = engine.optimizer
    for flat in optimizer.single_partition_of_fp32_groups:  # the inner AdamW has no state before its first step
        optimizer.optimizer.state[flat].update(
            step=torch.tensor(float(step)), exp_avg=torch.zeros_like(flat), exp_avg_sq=torch.zeros_like(flat)
        )
    _relink(engine)
    with torch.no_grad():
        for name, p in engine.module.named_parameters():
            p.data.copy_(tensors[f"param/{name}"])  # safe_set_* writes only the float32 master
            safe_set_full_fp32_param(p, tensors[f"param/{name}"].to(p.device))
            for key in ("exp_avg", "exp_avg_sq"):
                safe_set_full_optimizer_state(p, tensors[f"{key}/{name}"].to(p.device), key)
    engine.global_steps = int(read_json(folder / "state.json")["step"])
    return step


def _prune(run: Path, keep_every: int) -> None:
    """Keep the newest two, and every `keep_every`-th step; drop half-written ones."""
    steps = complete_steps(run)
    for step in steps[:-KEPT]:
        if not (keep_every and step % keep_every == 0):
            shutil.rmtree(step_folder(run, step), ignore_errors=True)
    for path in (run / "checkpoints").glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
