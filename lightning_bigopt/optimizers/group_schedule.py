"""Writes scheduled fields of parameter groups: base × schedule, adjustments, then bounds."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from lightning_bigopt.durations.progress import Progress
from lightning_bigopt.optimizers.base_values import base_values
from lightning_bigopt.optimizers.names import group_names
from lightning_bigopt.schedules.base import Schedule

__all__ = ["Adjustment", "BaseOwner", "GroupField", "GroupSchedule", "PlannedValue", "ScheduleOf"]

BaseOwner: TypeAlias = Literal["checkpoint", "config"]

ScheduleOf: TypeAlias = Callable[[str | None, str], Schedule]
"""Name of a group and label of its optimizer → the resolved schedule of the group."""

Adjustment: TypeAlias = Callable[[float, Progress], float]
"""Scheduled value and progress at the start of an update → the value to write."""


class GroupField:
    """Reads and writes a numeric field of a parameter group, or an entry of a tuple.

    Args:
        name: Name of the field, such as ``"weight_decay"`` or ``"betas[0]"``.

    Raises:
        ValueError: If ``name`` has another form.

    Example:
        >>> group = {"betas": (0.9, 0.999)}
        >>> field = GroupField("betas[1]")
        >>> field.write(group, 0.95), field.read(group), group
        (None, 0.95, {'betas': (0.9, 0.95)})
    """

    def __init__(self, name: str) -> None:
        match = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", name)
        if match is None or match[1] == "params":
            raise ValueError(
                f"field must name a number of the parameter groups, got {name!r}; write "
                "'weight_decay', 'momentum', 'betas[0]' or another field"
            )
        self.name = name
        self._key = match[1]
        self._index = None if match[2] is None else int(match[2])

    def read(self, group: Mapping[str, Any]) -> float:
        """Returns the value of the field in a group.

        Args:
            group: A parameter group of an optimizer.

        Raises:
            ValueError: If the group does not have the field, or it is not a number.
        """
        value = group.get(self._key)
        if self._index is not None and isinstance(value, (tuple, list)):
            value = value[self._index] if self._index < len(value) else None
        if isinstance(value, Tensor) and value.numel() == 1:
            return float(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            numbers = sorted(k for k, v in group.items() if isinstance(v, (int, float, tuple)))
            raise ValueError(
                f"field must name a number of the parameter groups, got {self.name!r}; the groups "
                f"have {', '.join(numbers)}"
            )
        return float(value)

    def write(self, group: dict[str, Any], value: float) -> None:
        """Writes the value to a group; a tensor is filled in place, which avoids recompilation.

        Args:
            group: A parameter group of an optimizer.
            value: The new value.
        """
        if self._index is None:
            if isinstance(group[self._key], Tensor):
                group[self._key].fill_(value)
            else:
                group[self._key] = value
            return
        parts = list(group[self._key])
        if isinstance(parts[self._index], Tensor):
            parts[self._index].fill_(value)
        else:
            parts[self._index] = value
            group[self._key] = type(group[self._key])(parts)


class PlannedValue(NamedTuple):
    """The value of a field for one group.

    Attributes:
        optimizer: Label of the optimizer; empty if there is only one.
        group: Name of the group for tags; empty if there is only one.
        value: The value.
    """

    optimizer: str
    group: str
    value: float


@dataclass
class _Claim:
    """The schedule, adjustments and bounds of one field of all groups."""

    field: GroupField
    bases: list[list[float]]
    base: BaseOwner = "checkpoint"
    schedule_of: ScheduleOf | None = None
    schedules: list[list[Schedule]] = dataclasses.field(default_factory=list)
    minimum: float | None = None
    maximum: float | None = None
    adjustments: dict[int, Adjustment] = dataclasses.field(default_factory=dict)  # by id of owner
    owner: int | None = None
    frozen_at: float | None = None  # the fraction at which the owner released the field


class GroupSchedule:
    """Writes the scheduled fields of all parameter groups of one or several optimizers.

    A value is ``base × schedule(fraction)``, passed through all adjustments and limited by absolute
    bounds. It is recomputed from its base at every write, so that rounding errors do not
    accumulate. The base of a group that is added later is its value at that time.

    Claim a field before a checkpoint is restored: the bases are the configured values, until
    :meth:`restore_bases` replaces them.

    Args:
        optimizers: Pairs of a label and an optimizer.

    Example:
        >>> import torch
        >>> from lightning_bigopt.schedules import Linear
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
        >>> groups = GroupSchedule([("", optimizer)])
        >>> groups.claim("lr")
        >>> groups.follow("lr", lambda group, label: Linear(), owner=None)
        >>> groups.adjust("lr", lambda value, progress: value / 2, owner=None)
        >>> groups.write(Progress(fraction=0.5))
        >>> optimizer.param_groups[0]["lr"]
        0.1
    """

    def __init__(self, optimizers: Sequence[tuple[str, Optimizer]]) -> None:
        self.optimizers = tuple(optimizers)
        self._claims: dict[str, _Claim] = {}
        self._released: dict[str, list[list[float]]] = {}  # bases of fields that were claimed
        self._fraction = 0.0  # of the last write

    def claim(self, name: str, *, base: BaseOwner | None = None) -> None:
        """Reads the bases of a field, at the first call of a fit.

        Args:
            name: The field, as for :class:`GroupField`.
            base: Bases to use after a resume: those of the ``"checkpoint"`` or those of the
                ``"config"``. Groups that were added during the run always use those of the
                checkpoint. None keeps the previous choice, initially ``"checkpoint"``.

        Raises:
            ValueError: If a group does not have the field.
        """
        if name not in self._claims:
            field = GroupField(name)
            current = [[field.read(g) for g in o.param_groups] for _, o in self]
            bases = [base_values(o, name, v) for (_, o), v in zip(self, current, strict=True)]
            self._claims[name] = _Claim(field, bases)
        self._claims[name].base = base or self._claims[name].base

    def follow(
        self,
        name: str,
        schedule_of: ScheduleOf,
        *,
        owner: object,
        minimum: float | None = None,
        maximum: float | None = None,
    ) -> None:
        """Schedules a claimed field.

        Args:
            name: The field.
            schedule_of: Returns the schedule of a group.
            owner: The object to pass to :meth:`release` to undo it.
            minimum: Lower bound of the value after the warm-up of the schedule; None for no bound.
            maximum: Upper bound of the value; None for no bound.
        """
        claim = self._claims[name]
        claim.schedule_of, claim.owner, claim.frozen_at = schedule_of, id(owner), None
        claim.schedules = [[] for _ in self.optimizers]
        claim.minimum, claim.maximum = minimum, maximum

    def adjust(self, name: str, adjustment: Adjustment, *, owner: object) -> None:
        """Adds an adjustment to a claimed field; it is applied after the schedule."""
        self._claims[name].adjustments[id(owner)] = adjustment

    def release(self, owner: object) -> None:
        """Removes the schedules and adjustments of an owner; scheduled values are kept."""
        for name, claim in list(self._claims.items()):
            claim.adjustments.pop(id(owner), None)
            if claim.owner == id(owner):
                claim.owner = claim.minimum = claim.maximum = None
                claim.frozen_at = self._fraction
            if claim.owner is None and not claim.adjustments:
                self._released[name] = self._claims.pop(name).bases

    def __iter__(self) -> Iterator[tuple[str, Optimizer]]:
        return iter(self.optimizers)

    def __bool__(self) -> bool:
        return bool(self._claims)

    def __contains__(self, name: str) -> bool:
        return name in self._claims

    def write(self, progress: Progress) -> None:
        """Writes every claimed field for the update that starts at ``progress``."""
        self._fraction = progress.fraction
        for claim in self._claims.values():
            for index, (label, optimizer) in enumerate(self.optimizers):
                groups = optimizer.param_groups
                values = _values(claim, index, label, groups, progress)
                for group, value in zip(groups, values, strict=True):
                    claim.field.write(group, value)

    def has_new_groups(self) -> bool:
        """Returns whether a group was added to which no value has been written."""
        return any(
            len(optimizer.param_groups) > len(claim.bases[index])
            for claim in self._claims.values()
            for index, (_, optimizer) in enumerate(self.optimizers)
        )

    def planned(self, name: str, progress: Progress) -> list[PlannedValue]:
        """Computes the values of a field for the update that starts at ``progress``."""
        claim = self._claims.get(name)
        planned: list[PlannedValue] = []
        for index, (label, optimizer) in enumerate(self.optimizers):
            groups = optimizer.param_groups
            if claim is None:
                values = [float(g[name]) if g.get(name) is not None else None for g in groups]
            else:
                values = list(_values(claim, index, label, groups, progress))
            planned += [
                PlannedValue(label, group, value)
                for group, value in zip(group_names(groups), values, strict=True)
                if value is not None  # the lr of Adafactor(relative_step=True), for example
            ]
        return planned

    def bases(self, name: str) -> list[list[float]]:
        """Returns the bases of a claimed or released field, one list for each optimizer."""
        claim = self._claims.get(name)
        return [list(bases) for bases in (self._released[name] if claim is None else claim.bases)]

    def set_bases(self, name: str, optimizer: int, bases: Sequence[float]) -> None:
        """Replaces the bases of the groups of one optimizer, given by its index."""
        self._claims[name].bases[optimizer] = [float(base) for base in bases]

    def restore_bases(self, name: str, optimizer: int, bases: Sequence[float]) -> None:
        """Replaces the bases of one optimizer by those of a checkpoint; see ``base`` of a claim."""
        claim = self._claims[name]
        # With "config" the configured groups keep their bases. The checkpoint may have more groups,
        # which callbacks added during the run; only it has their bases.
        configured = len(claim.bases[optimizer]) if claim.base == "config" else 0
        restored = [float(base) for base in bases[configured:]]
        claim.bases[optimizer] = claim.bases[optimizer][:configured] + restored

    def state_dict(self) -> dict[str, list[list[float]]]:
        """Returns the bases of all claimed fields."""
        return {name: self.bases(name) for name in self._claims}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the bases of the saved fields that are claimed in this fit."""
        for name, bases in state.items():
            if name in self._claims:
                for index, values in enumerate(bases[: len(self.optimizers)]):
                    self.restore_bases(name, index, values)


def _values(
    claim: _Claim, index: int, label: str, groups: list[dict[str, Any]], progress: Progress
) -> Iterator[float]:
    """Computes the value of a field for each group of one optimizer."""
    bases = claim.bases[index]
    fraction = progress.fraction if claim.frozen_at is None else claim.frozen_at
    bases.extend(claim.field.read(group) for group in groups[len(bases) :])  # of new groups
    schedules: list[Schedule] = []
    if claim.schedule_of is not None:
        schedules = claim.schedules[index]
        new_groups = groups[len(schedules) :]
        schedules.extend(claim.schedule_of(group.get("name"), label) for group in new_groups)
    factors: dict[int, float] = {}  # most groups share one schedule, which is evaluated once
    # A checkpoint may have had more groups.
    for position, base in enumerate(bases[: len(groups)]):
        value, schedule = base, None
        if schedules:
            schedule = schedules[position]
            factor = factors.get(id(schedule))
            if factor is None:
                factor = factors[id(schedule)] = schedule(fraction)
            value = base * factor
        for adjustment in claim.adjustments.values():
            value = adjustment(value, progress)
        if claim.maximum is not None:
            value = min(value, claim.maximum)
        if claim.minimum is not None and (schedule is None or fraction >= schedule.warmup_end()):
            value = max(value, claim.minimum)
        yield value
