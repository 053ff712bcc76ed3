"""What the strategy makes of the processes: who sees what data, who sums, who shards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_bigopt.batching.local_squares import LocalSquares

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "data_parallel_size",
    "data_rank",
    "is_deepspeed",
    "shard_group",
    "shards_gradients",
    "sum_over_data",
    "sum_over_data_",
    "watch_local_gradients",
]


def data_parallel_size(trainer: Trainer) -> int:
    """The number of processes that see different data."""
    if isinstance(trainer.strategy, ModelParallelStrategy):
        mesh = trainer.strategy.device_mesh
        return mesh["data_parallel"].size()
    return int(trainer.world_size)


def data_rank(trainer: Trainer) -> int:
    """This process's place among those that see different data."""
    if isinstance(trainer.strategy, ModelParallelStrategy):
        mesh = trainer.strategy.device_mesh
        return int(mesh["data_parallel"].get_local_rank())
    return int(trainer.global_rank)


def sum_over_data(trainer: Trainer, value: float) -> float:
    """The sum of a number over the processes that see different data; a collective."""
    if data_parallel_size(trainer) == 1:
        return value
    total = torch.tensor([value], device=trainer.strategy.root_device)
    return float(sum_over_data_(trainer, total.double() if total.is_cpu else total))


def sum_over_data_(trainer: Trainer, values: Tensor) -> Tensor:
    """Sums a tensor in place over the processes that see different data; a collective."""
    if data_parallel_size(trainer) > 1:
        group = None
        if isinstance(trainer.strategy, ModelParallelStrategy):
            mesh = trainer.strategy.device_mesh
            group = mesh["data_parallel"].get_group()
        torch.distributed.all_reduce(values, group=group)
    return values


def is_deepspeed(trainer: Trainer) -> bool:
    """Whether DeepSpeed owns gradients, clipping and accumulation."""
    return "DeepSpeed" in type(trainer.strategy).__name__


def shards_gradients(trainer: Trainer) -> bool:
    """Whether every backward averages over the processes, accumulating or not."""
    return isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy))


def shard_group(trainer: Trainer) -> ProcessGroup | None:
    """The group over which FSDP1 shards flat parameters; None where tensors know their shards."""
    if not isinstance(trainer.strategy, FSDPStrategy):
        return None
    model = trainer.strategy.model
    if getattr(getattr(model, "sharding_strategy", None), "name", None) == "NO_SHARD":
        return None  # every process holds whole gradients
    return getattr(model, "process_group", None)


def watch_local_gradients(trainer: Trainer) -> LocalSquares | None:
    """Has DDP note the norm of what this process contributes; None for other strategies.

    Raises:
        ValueError: If DDP has a communication hook already: it holds one.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy) or trainer.world_size == 1:
        return None
    squares = LocalSquares()
    refused = "ddp_comm_hook=" if strategy._ddp_comm_hook is not None else ""
    model: Any = strategy.model
    try:
        if not refused:
            # DDP reads the hook's annotations, and knows no postponed ones.
            model.register_comm_hook(squares, lambda state, bucket: state.reduce(bucket))
    except RuntimeError as error:
        refused = str(error)
    if refused:
        raise ValueError(
            "DDP must have no communication hook with GradientNoiseScale, which needs its own and "
            f"DDP holds one, got one ({refused}); remove the hook, or GradientNoiseScale"
        )
    return squares
