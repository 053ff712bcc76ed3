"""A strategy that simulates several processes in one, so that ``plan()`` starts no process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_bigopt.trainer_access.packages import own

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import DDPStrategy

    _Strategy = DDPStrategy
else:
    _Strategy = object

__all__ = ["planned_in_one_process"]


class _PlannedProcesses(_Strategy):
    """Process 0 of several processes that do not exist; collectives return their input.

    It stands before DDPStrategy of the Trainer's package, because Lightning then gives each loader
    a DistributedSampler: the lengths of loaders are those of one process, as in the real run.
    """

    strategy_name = "planned"

    def __init__(self, processes: int) -> None:
        super().__init__(parallel_devices=[torch.device("cpu")])
        self._processes = processes

    @property
    def world_size(self) -> int:
        return self._processes

    @property
    def global_rank(self) -> int:
        return 0

    @property
    def local_rank(self) -> int:
        return 0

    @property
    def is_global_zero(self) -> bool:
        return True

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self._processes, "rank": 0}

    def setup_environment(self) -> None:  # DDP would open a process group, and wait for the others
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)

    def configure_ddp(self) -> None: ...

    def setup(self, trainer: Trainer) -> None:  # only the optimizers; the module is not wrapped
        self.setup_optimizers(trainer)

    def barrier(self, *args: Any, **kwargs: Any) -> None: ...

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj

    def reduce(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor.unsqueeze(0)

    def teardown(self) -> None: ...


@contextmanager
def planned_in_one_process(trainer: Trainer) -> Iterator[None]:
    """Replaces a strategy of several processes by one that needs a single process.

    Args:
        trainer: Before ``fit``; its strategy is restored when the block ends.
    """
    if trainer.world_size == 1:
        yield
        return
    # trainer.strategy is a read-only property of this connector.
    connector = trainer._accelerator_connector
    original = connector.strategy
    bases = (_PlannedProcesses, own(trainer, "strategies.DDPStrategy"))
    planned: Any = type("PlannedProcesses", bases, {})(int(trainer.world_size))
    planned.accelerator = original.accelerator
    planned.precision_plugin = original.precision_plugin
    planned.checkpoint_io = original.checkpoint_io
    connector.strategy = planned
    try:
        yield
    finally:
        connector.strategy = original
