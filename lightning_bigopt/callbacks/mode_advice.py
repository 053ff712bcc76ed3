"""Advice on schedules for optimizers that evaluate an average of their weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from lightning.pytorch.utilities import rank_zero_info

from lightning_bigopt.engine.stage import Fit
from lightning_bigopt.optimizers.modes import has_modes
from lightning_bigopt.optimizers.names import group_names, part_optimizers
from lightning_bigopt.schedules.base import Schedule

__all__ = ["advise_on_modes"]


def advise_on_modes(fit: Fit, schedule_of: Callable[[str | None, str], Schedule]) -> None:
    """Logs that an optimizer with an evaluation mode needs no decay, if its schedule decays.

    Args:
        fit: The fit.
        schedule_of: Returns the schedule of a group by its name and the label of its optimizer.
    """
    parts = [
        (label, part)
        for label, optimizer in fit.groups
        for part in part_optimizers(optimizer).values() or (optimizer,)
        if has_modes(part)
    ]
    for label, part in parts:
        if any(_decays(schedule_of(name, label)) for name in group_names(part.param_groups)):
            rank_zero_info(
                f"{type(part).__name__} evaluates an average of its weights, which "
                "replaces the decay of the learning rate: it needs no schedule, or a warm-up "
                "only, as LearningRateScheduler(WarmupConstant())."
            )


def _decays(schedule: Schedule) -> bool:
    factors = [schedule(step / 100) for step in range(101)]
    return any(later < before for before, later in pairwise(factors))
