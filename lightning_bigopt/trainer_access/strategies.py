"""Properties of the strategy: data-parallel processes, reductions over them, and sharding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from lightning_bigopt.gradients.local_gradient_norm import LocalGradientNorm
from lightning_bigopt.trainer_access.packages import classes

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import (
        DDPStrategy,
        FSDPStrategy,
        ModelParallelStrategy,
        Strategy,
    )

__all__ = [
    "averages_initial_parameters",
    "check_first_window",
    "data_parallel_size",
    "data_rank",
    "is_deepspeed",
    "process_store",
    "register_gradient_norm_hook",
    "shard_group",
    "shards_gradients",
    "sum_over_data",
    "sum_over_data_",
]


def data_parallel_size(trainer: Trainer) -> int:
    """Returns the number of processes that train on different data."""
    if _is_model_parallel(trainer.strategy):
        mesh = trainer.strategy.device_mesh
        return mesh["data_parallel"].size()
    return int(trainer.world_size)


def data_rank(trainer: Trainer) -> int:
    """Returns the rank of this process among those that train on different data."""
    if _is_model_parallel(trainer.strategy):
        mesh = trainer.strategy.device_mesh
        return int(mesh["data_parallel"].get_local_rank())
    return int(trainer.global_rank)


def sum_over_data(trainer: Trainer, value: float) -> float:
    """Sums a number over the processes that train on different data; a collective."""
    if data_parallel_size(trainer) == 1:
        return value
    # On the root device, because NCCL reduces tensors on a GPU only.
    total = torch.tensor([value], device=trainer.strategy.root_device)
    return float(sum_over_data_(trainer, total.double() if total.is_cpu else total))


def sum_over_data_(trainer: Trainer, values: Tensor) -> Tensor:
    """Sums a tensor in place over the processes that train on different data; a collective."""
    if data_parallel_size(trainer) > 1:
        group = None
        if _is_model_parallel(trainer.strategy):
            mesh = trainer.strategy.device_mesh
            group = mesh["data_parallel"].get_group()
        torch.distributed.all_reduce(values, group=group)
    return values


def process_store(trainer: Trainer) -> Any:
    """Returns the key-value store of the process group, which can be read without waiting.

    None for one process, and for a backend without a store, such as MPI.
    """
    if trainer.world_size == 1 or not distributed.is_available():
        return None
    if not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store()


def is_deepspeed(trainer: Trainer) -> bool:
    """Returns whether the strategy is DeepSpeed, which accumulates, clips and steps itself."""
    return "DeepSpeed" in type(trainer.strategy).__name__  # its class needs the deepspeed package


def shards_gradients(trainer: Trainer) -> bool:
    """Returns whether every backward pass averages over the processes, also while accumulating."""
    return _is_fsdp(trainer.strategy) or _is_model_parallel(trainer.strategy)


def averages_initial_parameters(trainer: Trainer) -> bool:
    """Returns whether DDP averages the gradients of those parameters that it was given."""
    return _is_ddp(trainer.strategy) and trainer.world_size > 1


def check_first_window(trainer: Trainer) -> None:
    """Raises if the first accumulation window of a fit does not fit the strategy.

    Raises:
        ValueError: If DDP has a static graph and the window has several micro-batches: DDP records
            the graph in the first backward pass, and must reduce the gradients in it.
    """
    if not _is_ddp(trainer.strategy):
        return
    length = int(trainer.accumulate_grad_batches)
    if length > 1 and getattr(trainer.strategy.model, "static_graph", False):
        raise ValueError(
            "the first update of a fit must have one micro-batch with "
            f"DDPStrategy(static_graph=True), got {length}; accumulate later, as with "
            f"GradientAccumulationScheduler({{0: 1, 1: {length}}}), or remove static_graph"
        )


def shard_group(trainer: Trainer) -> ProcessGroup | None:
    """Returns the process group over which FSDP1 shards flat parameters; None otherwise.

    DTensors (FSDP2) carry their process groups themselves.
    """
    if not _is_fsdp(trainer.strategy):
        return None
    model = trainer.strategy.model
    if getattr(getattr(model, "sharding_strategy", None), "name", None) == "NO_SHARD":
        return None  # every process holds full gradients
    return getattr(model, "process_group", None)


def register_gradient_norm_hook(trainer: Trainer) -> LocalGradientNorm | None:
    """Registers a DDP communication hook that measures the gradient of this process.

    Returns:
        The state of the hook; None for other strategies and for one process.

    Raises:
        ValueError: If DDP already has a communication hook; it supports only one.
    """
    strategy = trainer.strategy
    if not _is_ddp(strategy) or trainer.world_size == 1:
        return None
    norm, model = LocalGradientNorm(), strategy.model
    if not isinstance(model, DistributedDataParallel):  # plan() does not wrap the module
        return None
    # On a CPU Lightning silently ignores DDPStrategy(ddp_comm_hook=). Without this check, a second
    # hook would be accepted on a CPU and raise on a GPU.
    conflict = "" if strategy._ddp_comm_hook is None else "ddp_comm_hook="
    try:
        if not conflict:
            # A lambda, because DDP checks the annotations of the hook, and does not resolve those
            # that are strings under ``from __future__ import annotations``.
            model.register_comm_hook(norm, lambda state, bucket: state.reduce(bucket))
    except RuntimeError as error:
        conflict = str(error)
    if conflict:
        raise ValueError(
            "DDP must have no communication hook with GradientNoiseScale, which needs the only "
            f"one, got one ({conflict}); remove the hook or GradientNoiseScale"
        )
    return norm


def _is_ddp(strategy: Strategy) -> TypeGuard[DDPStrategy]:
    return isinstance(strategy, classes("strategies.DDPStrategy"))


def _is_fsdp(strategy: Strategy) -> TypeGuard[FSDPStrategy]:
    return isinstance(strategy, classes("strategies.FSDPStrategy"))


def _is_model_parallel(strategy: Strategy) -> TypeGuard[ModelParallelStrategy]:
    return isinstance(strategy, classes("strategies.ModelParallelStrategy"))
