"""The optimizers of a fit: their step controls, schedulers and base values, also when replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_bigopt.engine.lr_scheduler import LightningLRScheduler
from lightning_bigopt.gradients.optimizer_step import installed_step_control, step_control
from lightning_bigopt.optimizers.base_values import remember_bases
from lightning_bigopt.optimizers.group_schedule import GroupSchedule
from lightning_bigopt.optimizers.names import optimizer_label, unwrapped
from lightning_bigopt.trainer_access import callbacks, schedulers

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "adopt_values",
    "check_hook_reached",
    "follow_optimizers",
    "group_schedule",
    "install",
    "repeated_evaluation",
    "repeated_evaluations",
    "restore_repeated_evaluations",
    "uninstall",
]


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


def install(trainer: Trainer, groups: GroupSchedule, *, controls_steps: bool) -> None:
    """Installs step controls, and registers the schedulers that Lightning saves and shows.

    Args:
        trainer: The Trainer.
        groups: The schedule of its parameter groups.
        controls_steps: Whether a capability has a stage of an update.
    """
    for index, (label, optimizer) in enumerate(groups):
        # Before the first step, because a step that is already running cannot be controlled. A step
        # that was replaced may be compiled: the control evaluates the closure, with the hooks of
        # all callbacks, outside of it.
        if controls_steps or "step" in vars(optimizer):
            step_control(optimizer).evaluations.are_undone = False
        if "lr" in groups:
            scheduler = LightningLRScheduler(optimizer, groups, index=index)
            schedulers.add_scheduler(trainer, scheduler, name=label or None)


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


def check_hook_reached(trainer: Trainer, first_step: int) -> None:
    """Raises if an update was made without a call of ``on_before_optimizer_step``.

    Raises:
        RuntimeError: If ``global_step`` has increased since ``first_step``.
    """
    if trainer.global_step > first_step:
        raise RuntimeError(
            "on_before_optimizer_step must be called for every update, got an update without it "
            f"(strategy {type(trainer.strategy).__name__}); call super() in overridden hooks, "
            "or remove the callbacks of lightning_bigopt"
        )


def repeated_evaluation(trainer: Trainer, optimizer: Optimizer) -> ValueError:
    """Creates the error for a repeated evaluation of the closure in an accumulation window.

    Lightning's closure computes the gradient of the last batch only, and adds it to the gradients
    of the evaluations before.
    """
    return ValueError(
        "accumulation windows must have one batch with an optimizer that evaluates its closure "
        f"several times per step, got {int(trainer.accumulate_grad_batches)} batches and "
        f"{type(unwrapped(optimizer)).__name__}; use larger batches instead of accumulation"
    )


def repeated_evaluations(groups: GroupSchedule) -> list[bool | None]:
    """Returns for each optimizer whether it evaluates its closure several times; None if unknown.

    It is saved, so that the first step of a resumed run can be undone, or needs no copies.
    """
    controls = [installed_step_control(optimizer) for _, optimizer in groups]
    return [None if control is None else control.evaluations.repeat for control in controls]


def restore_repeated_evaluations(groups: GroupSchedule, saved: Sequence[bool | None]) -> None:
    """Restores the result of :func:`repeated_evaluations`."""
    for (_, optimizer), repeat in zip(groups, saved, strict=False):  # optimizers may be new
        control = installed_step_control(optimizer)
        if control is not None:
            control.evaluations.repeat = repeat
