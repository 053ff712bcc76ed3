"""One scheduled field of all parameter groups: its bases, schedules, adjustments and bounds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from torch.optim import Optimizer

from lightning_bigopt.durations.progress import Progress
from lightning_bigopt.optimizers.base_values import ForeignValue, base_values
from lightning_bigopt.optimizers.group_field import GroupField
from lightning_bigopt.optimizers.names import group_names

__all__ = ["Adjustment", "BaseOwner", "FieldClaim", "PlannedValue", "ScheduleOf"]

BaseOwner: TypeAlias = Literal["checkpoint", "config"]


class Factor(Protocol):
    """A resolved schedule: the factor at a fraction of the budget, and the end of the warm-up."""

    def __call__(self, fraction: float) -> float: ...
    def warmup_end(self) -> float: ...


ScheduleOf: TypeAlias = Callable[[str | None, str], Factor]
"""Name of a group and label of its optimizer → the resolved schedule of the group."""

Adjustment: TypeAlias = Callable[[float, Progress], float]
"""Scheduled value and progress at the start of an update → the value to write."""


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
class FieldClaim:
    """The schedule, adjustments and bounds of one field of all groups."""

    field: GroupField
    bases: list[list[float]]
    written: list[list[float | None]]  # the last values; None where they are not known
    marks: list[list[tuple[object, int]]] = dataclasses.field(default_factory=list)
    notes: dict[int, str] = dataclasses.field(default_factory=dict)  # by id of an optimizer
    adopted: set[tuple[int, int]] = dataclasses.field(default_factory=set)  # by the last adopt()
    adopted_at: int | None = None  # the update before which a value of other code was found
    foreign_updates: int = 0  # the updates before which such a value was found
    stepped: dict[tuple[int, int], float] = dataclasses.field(default_factory=dict)
    base: BaseOwner = "checkpoint"
    schedule_of: ScheduleOf | None = None
    schedules: list[list[Factor]] = dataclasses.field(default_factory=list)
    minimum: float | None = None
    maximum: float | None = None
    adjustments: dict[int, Adjustment] = dataclasses.field(default_factory=dict)  # by id of owner
    unplanned: set[int] = dataclasses.field(default_factory=set)  # owners of measured adjustments
    owner: int | None = None
    frozen_at: float | None = None  # the fraction at which the owner released the field

    @classmethod
    def of(cls, name: str, optimizers: Sequence[tuple[str, Optimizer]]) -> FieldClaim:
        """Reads the bases of a field."""
        claim = cls(GroupField(name), [], [])
        claim.follow_optimizers(optimizers, [None] * len(optimizers))
        return claim

    def schedules_of(self, label: str, groups: Sequence[dict[str, Any]]) -> list[Factor]:
        """Returns the schedule of each group; an empty list if the field is not scheduled."""
        if self.schedule_of is None:
            return []
        # A group without a name has the name that the charts show.
        return [
            self.schedule_of(group.get("name") or name or None, label)
            for group, name in zip(groups, group_names(groups), strict=True)
        ]

    def follow_groups(
        self,
        index: int,
        label: str,
        groups: Sequence[dict[str, Any]],
        places: Sequence[int | None],
    ) -> None:
        """Keeps the values of known groups; a new group brings its own base."""
        bases, written = self.bases[index], self.written[index]
        # A checkpoint may have had groups that callbacks add only later in this run.
        waiting = bases[len(written) :]
        added = [group for group, place in zip(groups, places, strict=True) if place is None]
        values = dict(zip(map(id, groups), self.field.read_all(groups), strict=True))
        new = [values[id(group)] or 0.0 for group in added[len(waiting) :]]
        of_added = [*waiting[: len(added)], *new]
        own = iter(of_added)
        self.bases[index] = [
            *(next(own) if place is None else bases[place] for place in places),
            *waiting[len(added) :],
        ]
        self.written[index] = [None if place is None else written[place] for place in places]
        self.schedules[index] = self.schedules_of(label, groups)

    def follow_optimizers(
        self, optimizers: Sequence[tuple[str, Optimizer]], places: Sequence[int | None]
    ) -> None:
        """Keeps the values of known optimizers; a new one brings its own bases."""
        bases: list[list[float]] = []
        written: list[list[float | None]] = []
        for (_, optimizer), place in zip(optimizers, places, strict=True):
            if place is None:
                values, note = base_values(optimizer, self.field)
                bases.append(values)
                written.append(self.field.read_all(optimizer.param_groups))
                self.notes[id(optimizer)] = note
            else:
                bases.append(self.bases[place])
                written.append(self.written[place])
        self.bases, self.written = bases, written
        self.schedules = [self.schedules_of(label, o.param_groups) for label, o in optimizers]

    def write_bases(self, key: str, groups: Sequence[Sequence[dict[str, Any]]]) -> None:
        """Stores the base of each group under another key of the group."""
        for of_optimizer, bases in zip(groups, self.bases, strict=True):
            for group, base in zip(of_optimizer, bases, strict=False):
                group[key] = base

    def adopt(
        self, optimizers: Sequence[tuple[str, Optimizer]], *, update: int
    ) -> list[ForeignValue]:
        """Makes the values that other code has written the bases of their groups.

        Args:
            optimizers: Pairs of a label and an optimizer.
            update: Number of the update that comes next.

        Returns:
            These values.

        Raises:
            ValueError: If a value is not finite, or the previous update had such a value, too.
        """
        found: list[ForeignValue] = []
        stepped, self.stepped = self.stepped, {}
        self.adopted = set()
        for index, (label, optimizer) in enumerate(optimizers):
            names = group_names(optimizer.param_groups)
            for position, group in enumerate(optimizer.param_groups):
                written, used = self.written[index][position], stepped.get((index, position))
                if written is None:
                    continue
                value = self.field.read(group)
                if value == written and used is None:
                    continue
                if value != written:
                    self.bases[index][position] = value
                    self.adopted.add((index, position))
                found.append(
                    ForeignValue(
                        self.field.name, label, names[position], written, value=value, used=used
                    )
                )
        if found:
            _check(found, is_repeated=self.adopted_at == update - 1)
            self.foreign_updates += self.adopted_at != update
            self.adopted_at = update
        return found

    def note_step(self, index: int, groups: Sequence[dict[str, Any]]) -> None:
        """Notes the values of other code that an update of an optimizer has used."""
        for position, (group, written) in enumerate(zip(groups, self.written[index], strict=True)):
            if written is not None and (value := self.field.read(group)) != written:
                self.stepped[index, position] = value

    def restore_bases(self, index: int, bases: Sequence[float]) -> None:
        """Replaces the bases of one optimizer by those of a checkpoint; see :attr:`base`."""
        # With "config" the configured groups keep their bases. The checkpoint may have more groups,
        # which callbacks added during the run; only it has their bases.
        configured = len(self.bases[index]) if self.base == "config" else 0
        restored = [float(base) for base in bases[configured:]]
        self.bases[index] = self.bases[index][:configured] + restored

    def restore_written(self, saved: Sequence[Sequence[float | None]]) -> None:
        """Restores the last values of a checkpoint; values that it does not have are not known."""
        for index, before in enumerate(self.written):
            values = saved[index] if index < len(saved) and self.base == "checkpoint" else ()
            unknown = [None] * (len(before) - len(values))
            self.written[index] = [*values[: len(before)], *unknown]


def _check(found: Sequence[ForeignValue], *, is_repeated: bool) -> None:
    for foreign in found:
        for value in (foreign.value, foreign.used):
            if value is None:
                continue
            if not math.isfinite(value) or (foreign.field == "lr" and value < 0):
                raise ValueError(
                    f"{foreign.field} must be finite and not negative in every parameter group, "
                    f"got {value}; find the code that changed {foreign}"
                )
    if is_repeated:
        raise ValueError(
            f"{found[0].field} must have one writer, got other code that changes it for two "
            f"updates in a row ({found[0]} in this one); remove that code, such as a warm-up in "
            "optimizer_step, or a callback that writes once per epoch if an epoch has one update, "
            "and write it as a schedule"
        )
