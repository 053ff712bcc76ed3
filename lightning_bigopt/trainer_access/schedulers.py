"""The learning-rate schedulers that are registered with Lightning."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR

from lightning_bigopt.optimizers.names import unwrapped
from lightning_bigopt.trainer_access.packages import own

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.utilities.types import LRSchedulerConfig

__all__ = ["add_scheduler", "initial_lrs", "remove_schedulers", "scheduler_names"]


def add_scheduler(trainer: Trainer, scheduler: LRScheduler, *, name: str | None) -> None:
    """Registers a scheduler that Lightning saves, restores and shows, but never steps.

    Args:
        trainer: The Trainer, in ``on_fit_start``.
        scheduler: The scheduler.
        name: Name in LearningRateMonitor; None for Lightning's default.
    """
    # The frequency keeps Lightning from calling scheduler.step(): the engine writes the values of
    # all fields at the same time.
    config = own(trainer, "utilities.types.LRSchedulerConfig")
    trainer.strategy.lr_scheduler_configs.append(
        config(scheduler=scheduler, interval="step", frequency=sys.maxsize, name=name)
    )


def remove_schedulers(trainer: Trainer, kind: type = object) -> dict[int, str]:
    """Removes the registered schedulers of a class, for this fit.

    Returns:
        The names of these schedulers in LearningRateMonitor, by id of the optimizer; schedulers
        without a name are left out.
    """
    kept: list[LRSchedulerConfig] = []
    names: dict[int, str] = {}
    for config in trainer.lr_scheduler_configs:
        if not isinstance(config.scheduler, kind):
            kept.append(config)
        elif config.name is not None and hasattr(config.scheduler, "optimizer"):
            names.setdefault(id(unwrapped(config.scheduler.optimizer)), config.name)
    trainer.strategy.lr_scheduler_configs = kept
    return names


def initial_lrs(trainer: Trainer) -> dict[int, list[float]]:
    """Returns the learning rates before the module's schedulers scaled them, by id of optimizer.

    The constructors of torch's schedulers scale ``lr`` at once, and keep the former value as
    ``initial_lr``. A learning rate that was written since then, as by a finder, is returned as is.

    Raises:
        ValueError: If a scheduler overwrites ``initial_lr`` and the momentum.
    """
    found: dict[int, list[float]] = {}
    for config in trainer.lr_scheduler_configs:
        scheduler: Any = config.scheduler
        if isinstance(scheduler, OneCycleLR | CyclicLR):
            raise ValueError(
                "configure_optimizers must not return a OneCycleLR or CyclicLR with "
                f"LearningRateScheduler, got {type(scheduler).__name__}, which overwrites "
                "initial_lr and momentum of the optimizer; return the optimizer only"
            )
        if not isinstance(scheduler, LRScheduler):
            continue  # it may have neither groups nor learning rates
        found[id(unwrapped(scheduler.optimizer))] = [
            float(group.get("initial_lr", group["lr"]))
            if float(group["lr"]) == float(last)
            else float(group["lr"])
            for group, last in zip(
                scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=False
            )
        ]
    return found


def scheduler_names(trainer: Trainer) -> str:
    """Returns the class names of the registered schedulers, separated by commas."""
    return ", ".join(type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs)
