"""The learning-rate schedulers that are registered with Lightning."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR

from lightning_bigopt.optimizers.names import unwrapped
from lightning_bigopt.trainer_access.packages import own

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.utilities.types import LRSchedulerConfig

__all__ = [
    "add_scheduler",
    "initial_lrs",
    "load_scheduler_states",
    "remove_schedulers",
    "scheduled_optimizers",
    "scheduler_names",
    "scheduler_states",
]


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


def scheduler_states(trainer: Trainer) -> list[dict[str, Any]]:
    """Returns copies of the states of the schedulers that Lightning steps, in their order."""
    return [copy.deepcopy(config.scheduler.state_dict()) for config in _stepped(trainer)]


def load_scheduler_states(
    trainer: Trainer, states: Sequence[dict[str, Any]], *, unless: set[int]
) -> None:
    """Restores the result of :func:`scheduler_states`.

    Args:
        trainer: The Trainer.
        states: The states.
        unless: The ids of optimizers whose schedulers stay as they are.
    """
    for config, state in zip(_stepped(trainer), states, strict=False):
        if id(_optimizer_of(config)) not in unless:
            config.scheduler.load_state_dict(copy.deepcopy(state))


def scheduled_optimizers(trainer: Trainer, *, by_epoch: bool = False) -> set[int]:
    """Returns the ids of the optimizers with a scheduler that Lightning steps.

    Args:
        trainer: The Trainer.
        by_epoch: Only those with a scheduler that is stepped after epochs or validations.
    """
    return {
        id(_optimizer_of(config))
        for config in _stepped(trainer)
        if not by_epoch or config.interval != "step" or config.reduce_on_plateau
    }


def _stepped(trainer: Trainer) -> Iterator[LRSchedulerConfig]:
    return (c for c in trainer.lr_scheduler_configs if c.frequency != sys.maxsize)


def _optimizer_of(config: LRSchedulerConfig) -> Any:
    optimizer = getattr(config.scheduler, "optimizer", None)
    return None if optimizer is None else unwrapped(optimizer)
