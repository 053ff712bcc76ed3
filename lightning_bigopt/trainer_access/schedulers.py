"""The learning-rate schedulers that are registered with Lightning."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim.lr_scheduler import LRScheduler

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["add_scheduler", "remove_schedulers", "scheduler_names"]


def add_scheduler(trainer: Trainer, scheduler: LRScheduler, *, name: str | None) -> None:
    """Registers a scheduler that Lightning saves, restores and shows, but never steps.

    Args:
        trainer: The Trainer, in ``on_fit_start``.
        scheduler: The scheduler.
        name: Name in LearningRateMonitor; None for Lightning's default.
    """
    # The frequency keeps Lightning from calling scheduler.step(): the engine writes the values of
    # all fields at the same time.
    trainer.strategy.lr_scheduler_configs.append(
        LRSchedulerConfig(scheduler=scheduler, interval="step", frequency=sys.maxsize, name=name)
    )


def remove_schedulers(trainer: Trainer) -> None:
    """Removes the schedulers that the module configured, for this fit."""
    trainer.strategy.lr_scheduler_configs = []


def scheduler_names(trainer: Trainer) -> str:
    """Returns the class names of the registered schedulers, separated by commas."""
    return ", ".join(type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs)
