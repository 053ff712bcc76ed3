"""HyperparameterScheduler."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_bigopt.callbacks.base import OptimizationCallback
from lightning_bigopt.clock import BatchCount, ClockSettings, OnResume
from lightning_bigopt.controllers.hyperparameter import HyperparameterController
from lightning_bigopt.schedules import Schedule

__all__ = ["HyperparameterScheduler"]


class HyperparameterScheduler(OptimizationCallback):
    """Schedules any number of the parameter groups other than the learning rate.

    The base is each group's own value; several of these may be in one list, one a field.

    Args:
        field: ``"weight_decay"``, ``"momentum"``, ``"betas[0]"``, ``"betas[1]"``, ``"eps"`` or any
            other numeric field of the optimizer's groups.
        schedule: The factor over the budget.
        groups: Other schedules for named parameter groups.
        budget: As for :class:`LearningRateScheduler`: there is one clock per Trainer.
        samples: Counts the samples in a batch.
        tokens: Counts the tokens in a batch.
        on_resume: ``"continue"`` on the checkpoint's horizon, or ``"extend"`` to this Trainer's.

    Raises:
        ValueError: At fit start for a field that the groups do not have.

    State:
        ``clock``: what has been consumed, and the horizon; ``bases``: the base values.

    Example:
        >>> from lightning_bigopt import HyperparameterScheduler, Linear
        >>> HyperparameterScheduler("weight_decay", Linear(start=1.0, end=2.0))
        HyperparameterScheduler('weight_decay', Linear(...))
    """

    controller: HyperparameterController

    def __init__(
        self,
        field: str,
        schedule: Schedule,
        *,
        groups: Mapping[str, Schedule] | None = None,
        budget: str | None = None,
        samples: BatchCount = None,
        tokens: BatchCount = None,
        on_resume: OnResume | None = None,
    ) -> None:
        settings = ClockSettings(budget=budget, samples=samples, tokens=tokens, on_resume=on_resume)
        super().__init__(
            HyperparameterController(field, schedule, groups=groups, settings=settings)
        )

    @property
    def state_key(self) -> str:
        """One of each field may be saved in a checkpoint."""
        return f"HyperparameterScheduler[{self.controller.field.name}]"

    def __repr__(self) -> str:
        schedule = type(self.controller.schedule).__name__
        return f"HyperparameterScheduler({self.controller.field.name!r}, {schedule}(...))"
