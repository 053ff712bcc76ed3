"""Schedules for all parameter groups, for named groups, and for single optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lightning_bigopt.checks import check_instance
from lightning_bigopt.engine.stage import Fit
from lightning_bigopt.schedules.base import Schedule
from lightning_bigopt.schedules.shapes import CooldownShape

__all__ = ["GroupSchedules"]


class GroupSchedules:
    """Selects and resolves the schedule of each parameter group.

    Args:
        schedule: Schedule of all groups that have no other schedule.
        groups: Schedules by name of a parameter group.
        optimizers: Schedules by label of an optimizer.
        hint: Example of a schedule for the error message.
    """

    def __init__(
        self,
        schedule: Schedule,
        groups: Mapping[str, Schedule] | None,
        optimizers: Mapping[str, Schedule] | None = None,
        *,
        hint: str,
    ) -> None:
        check_instance("schedule", schedule, Schedule, hint=f"try {hint}")
        self._schedule = schedule
        self._groups, self._optimizers = dict(groups or {}), dict(optimizers or {})
        self._of_all = schedule
        self.is_resolved = False
        self._of_group: dict[str | None, Schedule] = {}
        self._of_optimizer: dict[str, Schedule] = {}

    @property
    def need_horizon(self) -> bool:
        """Whether the factor of a schedule depends on the fraction of the budget."""
        schedules = (self._schedule, *self._groups.values(), *self._optimizers.values())
        return not all(schedule.is_constant for schedule in schedules)

    def resolve(
        self,
        fit: Fit,
        *,
        cooldown_shape: CooldownShape = "1-sqrt",
        cooldown_end: float = 0.0,
    ) -> None:
        """Resolves all schedules on the horizon, and adds the cooldown that a resume starts.

        Args:
            fit: The fit, after the clock has started.
            cooldown_shape: Shape of the cooldown.
            cooldown_end: Factor at the end of the cooldown.

        Raises:
            ValueError: If a name is unknown, or a duration does not fit into the horizon.
        """
        self.is_resolved = False
        groups = [group for _, optimizer in fit.groups for group in optimizer.param_groups]
        _check_known(
            "groups",
            "parameter groups of the optimizer",
            self._groups,
            {group["name"] for group in groups if "name" in group},
        )
        labels = {label for label, _ in fit.groups if label}
        _check_known("optimizers", "one of several optimizers", self._optimizers, labels)
        horizon, cooldown = fit.clock.horizon, fit.clock.cooldown

        def resolved(schedule: Schedule) -> Schedule:
            if horizon is None:  # all schedules are constant, see need_horizon
                return schedule
            result = schedule.resolve(horizon)
            if cooldown is None:
                return result
            at, over = cooldown
            return result.with_cooldown(at, over=over, shape=cooldown_shape, end=cooldown_end)

        self._of_all = resolved(self._schedule)
        self._of_group = {name: resolved(schedule) for name, schedule in self._groups.items()}
        self._of_optimizer = {n: resolved(schedule) for n, schedule in self._optimizers.items()}
        self.is_resolved = True

    def schedule_of(self, group: str | None, optimizer: str) -> Schedule:
        """Returns the resolved schedule of a group: by its name, its optimizer, or for all."""
        named = self._of_group.get(group)
        return self._of_optimizer.get(optimizer, self._of_all) if named is None else named


def _check_known(name: str, kind: str, names: Iterable[str], known: set[str]) -> None:
    missing = sorted(set(names) - known)
    if missing:
        raise ValueError(
            f"{name} must name {kind}, got {missing!r}; the {name} are named {sorted(known)!r}"
        )
