"""The optimizers of a fit: their step controls, schedulers and base values, also when replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from lightning_bigopt.engine.lr_scheduler import LightningLRScheduler
from lightning_bigopt.gradients.optimizer_step import (
    installed_step_control,
    is_step_replaced,
    step_control,
)
from lightning_bigopt.optimizers.base_values import ForeignValue
from lightning_bigopt.optimizers.group_schedule import GroupSchedule
from lightning_bigopt.optimizers.names import optimizer_label, unwrapped
from lightning_bigopt.trainer_access import callbacks, loop, schedulers

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = [
    "adopt_values",
    "begin_evaluation",
    "follow_optimizers",
    "group_schedule",
    "install",
    "repeated_evaluations",
    "report_changes",
    "restore_repeated_evaluations",
    "uninstall",
]

# Of so many changes each is logged; the next ones are only counted.
_MANY_CHANGES = 3


def group_schedule(trainer: Trainer) -> GroupSchedule:
    """Creates the GroupSchedule of all parameter groups of the Trainer's optimizers."""
    return GroupSchedule(_labeled_optimizers(trainer))


def _labeled_optimizers(trainer: Trainer) -> list[tuple[str, Optimizer]]:
    optimizers = [unwrapped(optimizer) for optimizer in trainer.optimizers]
    return [(optimizer_label(optimizers, one), one) for one in optimizers]


class _Fit(Protocol):
    """The attributes of a fit that this module reads."""

    trainer: Trainer
    module: LightningModule
    groups: GroupSchedule
    known_optimizers: list[Optimizer]
    controls_steps: bool
    scheduler_names: dict[int, str]


def install(fit: _Fit) -> None:
    """Installs step controls, and registers the schedulers that Lightning saves and shows."""
    groups = fit.groups
    # A hook is compiled with the step, which takes one more compilation.
    watched = [optimizer for _, optimizer in groups if not is_step_replaced(optimizer)]
    groups.watch_steps(watched, is_watched=loop.is_current(fit.trainer))
    for note in groups.take_notes():
        rank_zero_info(note)
    for index, (_, optimizer) in enumerate(groups):
        # Before the first step, because a step that is already running cannot be controlled. A step
        # that was replaced may be compiled: the control evaluates the closure, with the hooks of
        # all callbacks, outside of it.
        if fit.controls_steps or "step" in vars(optimizer):
            step_control(optimizer).evaluations.are_undone = False
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
    groups.ignore_steps()
    for index, (_, optimizer) in enumerate(groups):
        if any(optimizer is kept for kept in keep):
            continue
        step_control(optimizer).remove()
        groups.remember(index)


def follow_optimizers(fit: _Fit) -> None:
    """Continues with the optimizers that the Trainer has now; call :func:`install` afterwards."""
    trainer, groups = fit.trainer, fit.groups
    fit.known_optimizers = list(trainer.optimizers)
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
    finetuning = callbacks.find_lightning_callback(trainer, "BackboneFinetuning")
    if (
        epoch_is_new
        and finetuning is not None
        and trainer.current_epoch > finetuning.unfreeze_backbone_at_epoch
    ):
        # It writes the learning rate of the last group, the backbone, and computes it from that of
        # the head, which is scheduled. As a base it would be multiplied by the schedule again.
        groups.forget_written(only_last_lr=True)
    found = groups.adopt()
    for name in dict.fromkeys(foreign.field for foreign in found):
        number = groups.foreign_updates(name)
        if number <= _MANY_CHANGES:
            rank_zero_info(_changes([foreign for foreign in found if foreign.field == name]))
        if number == _MANY_CHANGES:
            rank_zero_warn(
                f"Other code has changed {name} for {number} updates of this fit. Each of its "
                "values becomes a base value, which the schedule multiplies. A value that is "
                f"computed from the current one, as by group[{name!r}] *= 0.9, contains the factor "
                "of the schedule already, so that the factors accumulate. Write a schedule "
                "instead, such as the product of two schedules. Further changes are counted, and "
                "logged when the fit ends."
            )


def _changes(found: Sequence[ForeignValue]) -> str:
    """Returns the line for the changes of one field."""
    listed = ", ".join(map(str, found[:3])) + (f" and {len(found) - 3} more" * (len(found) > 3))
    used = any(foreign.used is not None for foreign in found)
    if all(foreign.is_temporary for foreign in found):
        return (
            f"Other code has changed {listed} for one update, and back. The update has used this "
            "value without the schedule."
        )
    text = f"Other code has changed {listed}. "
    if len(found) == 1:
        text += "This is the new base value, which the schedule multiplies."
    else:
        text += "These are the new base values, which the schedule multiplies."
    return text + " The update before has used the value without the schedule." * used


def report_changes(groups: GroupSchedule) -> None:
    """Logs at the end of a fit how often other code has changed each field, if often."""
    for name in groups.state_dict():
        number = groups.foreign_updates(name)
        if number > _MANY_CHANGES:
            rank_zero_info(f"Other code has changed {name} for {number} updates of this fit.")


def begin_evaluation(
    fit: _Fit, optimizer: Optimizer, *, may_reject: bool, accumulates: bool
) -> bool:
    """Prepares for an evaluation of the closure, which may be one of several in a step.

    Args:
        fit: The fit.
        optimizer: The optimizer that steps.
        may_reject: Whether a capability may reject the evaluation.
        accumulates: Whether the window has earlier batches.

    Returns:
        Whether the step has evaluated the closure before.

    Raises:
        ValueError: If it has, in an accumulation window. Lightning's closure computes the gradient
            of the last batch only, and adds it to the gradients of the evaluations before.
    """
    accumulates = accumulates and fit.module.automatic_optimization
    evaluations = step_control(optimizer).evaluations
    evaluations.are_undone = may_reject or accumulates
    is_repeated = evaluations.number > 1
    if is_repeated and accumulates:
        raise ValueError(
            "accumulation windows must have one batch with an optimizer that evaluates its closure "
            f"several times per step, got {int(fit.trainer.accumulate_grad_batches)} batches and "
            f"{type(unwrapped(optimizer)).__name__}; use larger batches instead of accumulation"
        )
    return is_repeated


def repeated_evaluations(groups: GroupSchedule) -> list[dict[str, bool | None] | None]:
    """Returns for each optimizer how it evaluates its closure; None without a step control.

    It is saved, so that the first step of a resumed run makes the same evaluations, and can be
    undone, or needs no copies.
    """
    controls = [installed_step_control(optimizer) for _, optimizer in groups]
    return [None if control is None else control.evaluations.state_dict() for control in controls]


def restore_repeated_evaluations(groups: GroupSchedule, saved: Sequence[Any]) -> None:
    """Restores the result of :func:`repeated_evaluations`."""
    for (_, optimizer), state in zip(groups, saved, strict=False):  # optimizers may be new
        control = installed_step_control(optimizer)
        if control is not None:
            control.evaluations.load_state_dict(state)
