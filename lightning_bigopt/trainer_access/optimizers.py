"""Optimizers: the names of what they train, their own names, the schedulers beside them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "add_scheduler",
    "is_private",
    "label_among",
    "optimizer_label",
    "remove_schedulers",
]


def optimizer_label(trainer: Trainer, optimizer: Optimizer) -> str:
    """``""`` for the only optimizer, its class's name for one of several (numbered if equal)."""
    return label_among(trainer.optimizers, optimizer)


def label_among(optimizers: Sequence[Any], optimizer: Optimizer) -> str:
    """:func:`optimizer_label` where there is no Trainer yet that knows the optimizers."""
    if len(optimizers) <= 1:
        return ""
    raw = [getattr(o, "optimizer", o) for o in optimizers]
    name = type(optimizer).__name__
    twins = [o for o in raw if type(o).__name__ == name]
    return name if len(twins) == 1 else f"{name}-{[id(o) for o in twins].index(id(optimizer))}"


def is_private(optimizer: Optimizer) -> bool:
    """Whether Opacus clips each sample's gradient and adds noise, for differential privacy."""
    return any(base.__module__.split(".")[0] == "opacus" for base in type(optimizer).__mro__)


def add_scheduler(trainer: Trainer, scheduler: LRScheduler, *, name: str | None) -> None:
    """Registers a scheduler that Lightning saves, restores and shows, and never steps.

    Its way to a scheduler's step costs more than the step.
    """
    trainer.strategy.lr_scheduler_configs.append(
        LRSchedulerConfig(scheduler=scheduler, interval="step", frequency=sys.maxsize, name=name)
    )


def remove_schedulers(trainer: Trainer) -> None:
    """Drops the schedulers that the module configured, for this fit."""
    trainer.strategy.lr_scheduler_configs = []
