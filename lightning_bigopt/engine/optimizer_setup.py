"""The optimizers of a fit: their step controls, schedulers and base values, also when replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_bigopt.engine.lr_scheduler import LightningLRScheduler
from lightning_bigopt.gradients.optimizer_step import step_control
from lightning_bigopt.optimizers.base_values import remember_bases
from lightning_bigopt.optimizers.group_schedule import GroupSchedule
from lightning_bigopt.optimizers.names import optimizer_label, unwrapped
from lightning_bigopt.trainer_access import callbacks, schedulers

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["adopt_values", "follow_optimizers", "group_schedule", "install", "uninstall"]


def group_schedule(trainer: Trainer) -> GroupSchedule:
    """Creates the GroupSchedule of all parameter groups of the Trainer's optimizers."""
    return GroupSchedule(_labeled_optimizers(trainer))


def _labeled_optimizers(trainer: Trainer) -> list[tuple[str, Optimizer]]:
    optimizers = [unwrapped(optimizer) for optimizer in trainer.optimizers]
    _separate_tensors(optimizers)
    return [(optimizer_label(optimizers, one), one) for one in optimizers]


def _separate_tensors(optimizers: Sequence[Optimizer]) -> None:
    """Gives each group its own tensors: a value is written in place, and would reach all groups."""
    seen: set[int] = set()
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        for name, value in group.items():
            if isinstance(value, Tensor):
                if id(value) in seen:
                    group[name] = value.clone()
                seen.add(id(value))


class _Fit(Protocol):
    """The attributes of a fit that :func:`install` reads."""

    trainer: Trainer
    groups: GroupSchedule
    controls_steps: bool
    scheduler_names: dict[int, str]


def install(fit: _Fit) -> None:
    """Installs step controls, and registers the schedulers that Lightning saves and shows."""
    groups = fit.groups
    for index, (_, optimizer) in enumerate(groups):
        if fit.controls_steps:
            # Before the first step, because a step that is already running cannot be controlled.
            step_control(optimizer)
        if "lr" in groups:
            scheduler = LightningLRScheduler(optimizer, groups, index=index)
            name = fit.scheduler_names.get(id(optimizer))
            schedulers.add_scheduler(fit.trainer, scheduler, name=name)


def uninstall(groups: GroupSchedule, *, keep: Sequence[Optimizer] = ()) -> None:
    """Removes the step controls, and stores the base values on the optimizers.

    Args:
        groups: The schedule of the parameter groups.
        keep: Optimizers that are left as they are.
    """
    bases, written = groups.state_dict(), groups.written()
    for index, (_, optimizer) in enumerate(groups):
        if any(optimizer is kept for kept in keep):
            continue
        step_control(optimizer).remove()
        for name in bases:
            values = written[name][index]
            remember_bases(optimizer, name, values=values, bases=bases[name][index])


def follow_optimizers(trainer: Trainer, groups: GroupSchedule) -> None:
    """Continues with the optimizers that the Trainer has now; call :func:`install` afterwards."""
    optimizers = _labeled_optimizers(trainer)
    uninstall(groups, keep=[optimizer for _, optimizer in optimizers])
    schedulers.remove_schedulers(trainer, LightningLRScheduler)
    groups.follow_optimizers(optimizers)
    rank_zero_info(
        "The optimizers were replaced during the fit. The schedules continue with the base values "
        "of the new ones."
    )


def adopt_values(trainer: Trainer, groups: GroupSchedule, *, epoch_is_new: bool = False) -> None:
    """Makes values that other code has written the base values; logs a line for each.

    Args:
        trainer: The Trainer.
        groups: The schedule of its parameter groups.
        epoch_is_new: Whether an epoch has just begun.

    Raises:
        ValueError: If other code writes a field for every update.
    """
    if epoch_is_new and callbacks.find_callback(trainer, callbacks.BackboneFinetuning) is not None:
        # It computes the learning rate of the backbone from that of the head, which is scheduled.
        # As a base value it would be multiplied by the schedule again.
        groups.forget_written()
    for foreign in groups.adopt():
        rank_zero_info(
            f"Other code has changed {foreign}. This is the new base value, which the schedule "
            "multiplies."
        )
