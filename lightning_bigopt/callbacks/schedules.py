"""Schedules for all parameter groups, for named groups, and for single optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches

from lightning_bigopt.checks import shown
from lightning_bigopt.engine.stage import Fit
from lightning_bigopt.optimizers.names import group_names, part_optimizers
from lightning_bigopt.schedules.base import Schedule
from lightning_bigopt.schedules.shapes import CooldownShape
from lightning_bigopt.type_checks import check_instance

__all__ = ["GroupSchedules"]


class GroupSchedules:
    """Selects and resolves the schedule of each parameter group.

    Args:
        schedule: Schedule of all groups that have no other schedule.
        groups: Schedules by name of a parameter group, or by the beginning of several names up to
            a dot; the longest decides. A group without a name has that of the charts, such as
            ``"group1"``.
        optimizers: Schedules by label of an optimizer; by its class if there is only one. The parts
            of a combined optimizer count as optimizers.
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
        self._groups = _by_name("groups", groups, hint=hint)
        self._optimizers = _by_name("optimizers", optimizers, hint=hint)
        self._of_all = schedule
        self.is_resolved = False
        self._of_group: dict[str, Schedule] = {}
        self._of_optimizer: dict[str, Schedule] = {}
        self._of_part: dict[str, Schedule] = {}

    @property
    def by_argument(self) -> dict[str, Schedule]:
        """All schedules by the argument that holds them, such as ``"groups['head']"``."""
        named = {"groups": self._groups, "optimizers": self._optimizers}
        others = {
            f"{argument}[{name!r}]": schedule
            for argument, schedules in named.items()
            for name, schedule in schedules.items()
        }
        return {"schedule": self._schedule, **others}

    @property
    def need_horizon(self) -> bool:
        """Whether the factor of a schedule depends on the fraction of the budget."""
        return not all(schedule.is_constant for schedule in self.by_argument.values())

    def resolve(
        self,
        fit: Fit,
        *,
        cooldown_shape: CooldownShape = "1-sqrt",
        cooldown_end: float = 0.0,
        change: Callable[[str, Schedule], Schedule] | None = None,
    ) -> None:
        """Resolves all schedules on the horizon, and adds the cooldown that a resume starts.

        Args:
            fit: The fit, after the clock has started.
            cooldown_shape: Shape of the cooldown.
            cooldown_end: Factor at the end of the cooldown.
            change: Is given the argument and the schedule, and returns the schedule to resolve;
                None to change none.

        Raises:
            ValueError: If a name is unknown, or a duration does not fit into the horizon.
        """
        self.is_resolved = False
        self._check_groups(fit)
        labels = {label or type(optimizer).__name__: label for label, optimizer in fit.groups}
        # A part of a combined optimizer has its own name, which its groups begin with.
        parts = [part for _, optimizer in fit.groups for part in part_optimizers(optimizer)]
        labels |= {part: part for part in parts}
        self._check_optimizers(labels, is_replaced=fit.has_started)
        horizon, cooldown = fit.clock.horizon, fit.clock.cooldown

        def resolved(argument: str, schedule: Schedule) -> Schedule:
            if horizon is None:  # all schedules are constant, see need_horizon
                return schedule
            result = (schedule if change is None else change(argument, schedule)).resolve(horizon)
            if cooldown is None:
                return result
            at, over = cooldown
            return result.with_cooldown(at, over=over, shape=cooldown_shape, end=cooldown_end)

        found = {name: resolved(name, s) for name, s in self.by_argument.items()}
        self._of_all = found["schedule"]
        self._of_group = {name: found[f"groups[{name!r}]"] for name in self._groups}
        schedules = {labels[n]: found[f"optimizers[{n!r}]"] for n in self._optimizers}
        self._of_part = {part: schedules[part] for part in parts if part in schedules}
        self._of_optimizer = {n: s for n, s in schedules.items() if n not in self._of_part}
        self.is_resolved = True

    def schedule_of(self, group: str | None, optimizer: str) -> Schedule:
        """Returns the resolved schedule of a group: by its name, its optimizer, or for all."""
        names = _beginnings(group or "")
        keys = (name for name in names if name in self._of_group)
        if (key := next(keys, None)) is not None:
            return self._of_group[key]
        return self._of_part.get(names[-1]) or self._of_optimizer.get(optimizer, self._of_all)

    def _check_groups(self, fit: Fit) -> None:
        named: set[str] = set()
        numbered: set[str] = set()  # the names that the charts show for groups without a name
        for _, optimizer in fit.groups:
            groups = optimizer.param_groups
            for group, name in zip(groups, group_names(groups), strict=True):
                named |= {group["name"]} if group.get("name") else set()
                numbered |= {name} if name and not group.get("name") else set()
        known = {beginning for name in named for beginning in _beginnings(name)}
        missing = sorted(set(self._groups) - known - numbered)
        if not missing:
            return
        way_out = f"name a group as {{'params': ..., 'name': {missing[0]!r}}}"
        if similar := get_close_matches(missing[0], named | numbered, n=1):
            way_out = f"did you mean {similar[0]!r}?"
        if named or numbered:
            way_out = f"the groups are named {sorted(named | numbered)!r}; {way_out}"
        raise ValueError(
            f"groups must name parameter groups of the optimizer, got {shown(missing)}; {way_out}"
        )

    def _check_optimizers(self, known: Iterable[str], *, is_replaced: bool) -> None:
        missing = sorted(set(self._optimizers) - set(known))
        if not missing:
            return
        way_out = f"the optimizers are named {sorted(known)!r}"
        if similar := get_close_matches(missing[0], list(known), n=1):
            way_out += f"; did you mean {similar[0]!r}?"
        if is_replaced:
            way_out += (
                " since they were replaced; use an optimizer of the same class, or pass the "
                "schedule as schedule=, which every optimizer without an entry follows"
            )
        raise ValueError(
            f"optimizers must name optimizers of the Trainer, got {shown(missing)}; {way_out}"
        )


def _beginnings(name: str) -> list[str]:
    """Returns a name and its beginnings up to a dot, the longest first.

    Example:
        >>> _beginnings("AdamW.head.no_decay")
        ['AdamW.head.no_decay', 'AdamW.head', 'AdamW']
    """
    words = name.split(".")
    return [".".join(words[:count]) for count in range(len(words), 0, -1)]


def _by_name(
    argument: str, schedules: Mapping[str, Schedule] | None, *, hint: str
) -> dict[str, Schedule]:
    """Returns schedules by name; raises unless they are a mapping from names to schedules."""
    if schedules is None:
        return {}
    if not isinstance(schedules, Mapping):
        raise ValueError(
            f"{argument} must be a dict from names to schedules, got {shown(schedules)}; write "
            f"{argument}={{'head': {hint}}}"
        )
    for name, schedule in schedules.items():
        check_instance(f"{argument}[{name!r}]", schedule, Schedule, hint=f"try {hint}")
    return dict(schedules)
