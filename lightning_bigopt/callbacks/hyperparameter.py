"""HyperparameterScheduler: schedules a numeric field of the parameter groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_bigopt.callbacks.schedules import GroupSchedules
from lightning_bigopt.engine.batch_contents import BatchCount
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.clock_settings import ClockSettings, OnResume
from lightning_bigopt.engine.stage import Fit
from lightning_bigopt.optimizers.group_field import GroupField
from lightning_bigopt.schedules.base import Schedule

__all__ = ["HyperparameterScheduler"]


class HyperparameterScheduler(Capability):
    """Schedules a numeric field of the parameter groups, other than the learning rate.

    Each group's configured value is its base. Add one callback for each field.

    Args:
        field: ``"weight_decay"``, ``"momentum"``, ``"betas[0]"``, ``"betas[1]"``, ``"eps"`` or any
            other numeric field of the parameter groups.
        schedule: Factor on the base over the budget, dimensionless.
        groups: Other schedules for named parameter groups.
        budget: As for :class:`LearningRateScheduler`; all callbacks of a Trainer share one clock.
        samples: Counts the samples of a batch: a function, or the name of a field.
        tokens: Counts the tokens of a batch: a function, or the name of an ids or mask field.
        on_resume: ``"continue"`` with the horizon of the checkpoint, or ``"extend"`` to the horizon
            of this Trainer.

    Raises:
        ValueError: At fit start if a parameter group does not have the field.

    State:
        None; the base values are in the state of the engine.

    Example:
        >>> from lightning_bigopt import HyperparameterScheduler, Linear
        >>> HyperparameterScheduler("weight_decay", Linear(start=1.0, end=2.0))
        HyperparameterScheduler('weight_decay', Linear(...))
    """

    rank = 25
    needs_horizon = True

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
        self.field = GroupField(field).name
        if field == "lr":
            raise ValueError(
                "field must not be 'lr', got 'lr'; use LearningRateScheduler for learning rates"
            )
        self._schedules = GroupSchedules(schedule, groups, hint="Linear(end=0.1)")
        self.owns = f"schedule of {field}"  # one callback for each field is allowed
        self.schedule = schedule
        self.groups = dict(groups or {})
        self.settings = ClockSettings(
            budget=budget, samples=samples, tokens=tokens, on_resume=on_resume
        )

    @property
    def state_key(self) -> str:
        """The key of the callback in checkpoints; it contains the field."""
        return f"HyperparameterScheduler[{self.field}]"

    def check_optimizers(self, fit: Fit) -> None:
        """Claims the field; the configured values become the bases."""
        fit.groups.claim(self.field)

    def start(self, fit: Fit) -> None:
        """Resolves the schedules on the horizon, and applies them to the field."""
        self._schedules.resolve(fit)
        fit.groups.follow(self.field, self._schedules.schedule_of, owner=self)

    def specification(self) -> str:
        """Returns the schedule as code."""
        return repr(self.schedule)

    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Restores the base values that version 0.1 saved in this callback's state."""
        if self.fit is not None:
            self.fit.groups.load_state_dict({self.field: state.get("bases", [])})

    def __repr__(self) -> str:
        return f"HyperparameterScheduler({self.field!r}, {type(self.schedule).__name__}(...))"
