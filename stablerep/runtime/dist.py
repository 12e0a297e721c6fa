"""Process group: start, gather with the right gradient, agree, finish. One rank works without a group's help too."""

import os
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor


def start(store: Any, rank: int, world: int, *, local_rank: int, gpus: int) -> None:
    """Join the process group through `store`; sets what DeepSpeed reads from the environment."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local_rank))
    os.environ.update(MASTER_ADDR=store.host, MASTER_PORT=str(store.port))
    if gpus:
        torch.cuda.set_device(local_rank)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(1)
    td.init_process_group("nccl" if gpus else "gloo", store=store, rank=rank, world_size=world)


def finish() -> None:
    """Leave together; without the barrier a rank may abort at exit."""
    td.barrier()
    td.destroy_process_group()


def rank() -> int:
    """This process's rank; 0 without a group."""
    return td.get_rank() if td.is_initialized() else 0


def world() -> int:
    """Number of ranks; 1 without a group."""
    return td.get_world_size() if td.is_initialized() else 1


def gather_features(features: Tensor) -> Tensor:
    """Concatenate [B, D] over ranks. The backward sums over ranks and returns the own slice, so that DDP's average of
    per-rank losses has exactly the gradient of the whole batch on one rank."""
    if world() == 1:
        return features
    import torch.distributed.nn.functional as functional

    return torch.cat(functional.all_gather(features))


def gather_ids(ids: Tensor) -> Tensor:
    """Concatenate [B] integers over ranks."""
    if world() == 1:
        return ids
    parts = [torch.empty_like(ids) for _ in range(world())]
    td.all_gather(parts, ids)
    return torch.cat(parts)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Differentiable sum over ranks."""
    if world() == 1:
        return x
    import torch.distributed.nn.functional as functional

    total: Tensor = functional.all_reduce(x)
    return total


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank; every rank gets the same answer."""
    if world() == 1:
        return flag
    value = torch.tensor(int(flag), device=device)
    td.all_reduce(value, op=td.ReduceOp.MAX)
    return bool(value.item())


def mean_over_ranks(x: Tensor) -> float:
    """Average of a scalar over ranks."""
    value = x.detach().float().clone()
    if world() > 1:
        td.all_reduce(value)
    return float(value.item()) / world()


def barrier() -> None:
    """Wait for all ranks."""
    if world() > 1:
        td.barrier()


def broadcast(value: Any) -> Any:
    """Rank 0's value, everywhere."""
    if world() == 1:
        return value
    box = [value]
    td.broadcast_object_list(box, src=0)
    return box[0]
