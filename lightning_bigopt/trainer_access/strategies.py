"""Properties of the strategy: data-parallel processes, reductions over them, and sharding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

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
    "check_no_ddp_hook",
    "data_parallel_size",
    "data_rank",
    "ddp_group",
    "is_deepspeed",
    "process_store",
    "reshard",
    "shard_group",
    "sharded_modules",
    "shards_gradients",
    "sum_over_data",
    "sum_over_data_",
]


def reshard(module: torch.nn.Module) -> None:
    """Makes the modules of FSDP2 hold their sharded parameters.

    After a forward pass without a backward pass, such as a validation, the outermost of them still
    hold whole parameters in their place.
    """
    for part in sharded_modules(module):
        part.reshard()


def sharded_modules(module: torch.nn.Module) -> list[Any]:
    """Returns the modules of FSDP2, by their method: the import of their class takes 60 ms."""
    return [part for part in module.modules() if hasattr(part, "reshard")]


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


def check_no_ddp_hook(trainer: Trainer, user: str) -> None:
    """Raises if the user gives DDP a communication hook.

    Raises:
        ValueError: For ``DDPStrategy(ddp_comm_hook=)``, also on a CPU, where Lightning ignores it.
    """
    if _is_ddp(trainer.strategy) and trainer.strategy._ddp_comm_hook is not None:
        raise ValueError(
            f"ddp_comm_hook must be None with {user}, which averages the gradients in a hook, got "
            f"{getattr(trainer.strategy._ddp_comm_hook, '__name__', 'one')}; remove one of them"
        )


def ddp_group(trainer: Trainer) -> ProcessGroup:
    """Returns the process group over which DDP averages gradients."""
    model = trainer.strategy.model
    assert isinstance(model, DistributedDataParallel)
    return model.process_group


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


def _is_ddp(strategy: Strategy) -> TypeGuard[DDPStrategy]:
    return isinstance(strategy, classes("strategies.DDPStrategy"))


def _is_fsdp(strategy: Strategy) -> TypeGuard[FSDPStrategy]:
    return isinstance(strategy, classes("strategies.FSDPStrategy"))


def _is_model_parallel(strategy: Strategy) -> TypeGuard[ModelParallelStrategy]:
    return isinstance(strategy, classes("strategies.ModelParallelStrategy"))
