"""The DeepSpeed engine, and every private name of DeepSpeed that we lean on (pinned in requirements.txt, and tested)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stablerep.optim import ReproducibleAdamW, parameter_groups
from stablerep.train_config import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
COMPILER = "inductor"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_engine(config: TrainConfig, model: Any, micro_batch: int, accumulation: int, gpus: bool) -> Any:
    """A DeepSpeed engine (ZeRO, mixed precision, clipping, accumulation) around a method, with torch's AdamW.

    A step whose gradients are not finite is skipped in every dtype (`engine.was_step_applied()`).
    """
    import deepspeed
    import deepspeed.ops

    if config.activation_checkpointing:
        model.encoder.set_grad_checkpointing(True)
    if config.compile:
        model.encoder.compile(backend=COMPILER)
    if not gpus:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled; gloo does without
    optim = config.optim
    adamw = ReproducibleAdamW if config.reproducible else torch.optim.AdamW
    optimizer = adamw(parameter_groups(model, optim.weight_decay), lr=0.0, betas=(optim.beta1, optim.beta2))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "zero_optimization": {"stage": config.zero_stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": config.dtype == "bf16"},
            "fp16": {"enabled": config.dtype == "fp16", "loss_scale": 0, "initial_scale_power": 16},
            "gradient_clipping": 0.0 if config.reproducible else optim.clip,  # else `full_gradient_step` clips
            "steps_per_print": 1 << 30,
        },
    )
    model.averages = {name: tensor.to(engine.device) for name, tensor in model.averages.items()}
    engine.optimizer.check_grad_overflow = True  # DeepSpeed's default for bf16 and fp16; fp32 deserves it too
    return engine


def set_rates(engine: Any, rate: float, decay: float) -> None:
    """Give the parameter groups the learning rate and, where they are decayed, the weight decay of the coming step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
        group["weight_decay"] = decay if group["decays"] else 0.0


@dataclass
class Fragment:
    """The part of a parameter whose float32 master and moments this rank holds: elements start .. start + numel."""

    name: str
    start: int
    numel: int
    tensors: dict[str, Tensor]  # `param`, `exp_avg`, `exp_avg_sq`, each [numel], float32


def fragments(engine: Any) -> Iterator[Fragment]:
    """This rank's fragments, in the order of the parameters."""
    optimizer = engine.optimizer
    for flat in optimizer.single_partition_of_fp32_groups:  # AdamW has no state before its first step
        state = optimizer.optimizer.state[flat]
        if "step" not in state:
            state.update(step=torch.tensor(0.0), **{key: torch.zeros_like(flat) for key in MOMENTS})
    # With several parameter groups DeepSpeed links the states after the first group's step, too early.
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()
    for name, p in engine.module.named_parameters():
        held = getattr(p, "_hp_mapping", None)
        if held is not None:
            address = held.lp_fragment_address
            moments = {key: held.get_optim_state_fragment(key) for key in MOMENTS}
            yield Fragment(name, address.start, address.numel, {"param": held.get_hp_fragment(), **moments})


def finish_loading(engine: Any, step: int) -> None:
    """After the fragments were filled: give AdamW its step count, and all ranks the weights in the training dtype."""
    optimizer = engine.optimizer
    for flat in optimizer.single_partition_of_fp32_groups:
        optimizer.optimizer.state[flat]["step"] = torch.tensor(float(step))
    optimizer.update_lp_params()
    for group in range(len(optimizer.bit16_groups)):
        optimizer._update_model_bit16_weights(group)
    engine.global_steps = step


def applied_steps(engine: Any) -> int:
    """Steps that changed the weights: what AdamW counts."""
    flat = engine.optimizer.single_partition_of_fp32_groups[0]
    return int(engine.optimizer.optimizer.state[flat].get("step", torch.tensor(0.0)).item())


def scaler_state(engine: Any) -> dict[str, Any]:
    """State of fp16's loss scaler, as plain numbers."""
    scaler = engine.optimizer.loss_scaler
    return {name: getattr(scaler, name) for name in SCALER if hasattr(scaler, name)}


def set_scaler_state(engine: Any, state: dict[str, Any]) -> None:
    """Put back what `scaler_state` returned."""
    for name, value in state.items():
        setattr(engine.optimizer.loss_scaler, name, value)


def full_parameter(p: Tensor) -> Tensor:
    """The float32 master of a parameter, whole, on every rank; a frozen one as it was trained with. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    if not p.requires_grad:
        return p.detach().float()
    whole: Tensor = safe_get_full_fp32_param(p)
    return whole


def clamp_parameter(p: Tensor, low: float, high: float) -> None:
    """Clamp a parameter and, on the ranks that hold it, its float32 master."""
    p.data.clamp_(low, high)
    held = getattr(p, "_hp_mapping", None)
    if held is not None:
        held.get_hp_fragment().clamp_(low, high)


def full_gradient_step(engine: Any, parameters: list[Tensor], gradients: list[Tensor], clip: float) -> None:
    """An optimizer step with gradients that every rank knows already (each gives the same). Rank 0 hands them to the
    engine, times the number of ranks, the others zeros: the engine's average over a power of two of ranks is then exact.
    Clipping (norm limit `clip`, 0: none) happens here, over whole tensors in one order, not over the engine's partitions."""
    from stablerep.runtime import dist

    norm = torch.stack([g.float().norm() for g in gradients]).norm()
    share = torch.clamp(clip / (norm + 1e-6), max=1.0) if clip else torch.ones(())
    factor = float(dist.world() if dist.rank() == 0 else 0)
    surrogate = torch.stack(
        [(p.float() * (g.float() * share * factor)).sum() for p, g in zip(parameters, gradients, strict=True)]
    )
    engine.backward(surrogate.sum(), scale_wrt_gas=False)
    engine.step()
