"""Writes scheduled fields of parameter groups: base × schedule, adjustments, then bounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter, is_
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_bigopt.durations.progress import Progress
from lightning_bigopt.optimizers.base_values import ForeignValue, is_loaded_state, matching_groups
from lightning_bigopt.optimizers.field_claim import (
    Adjustment,
    BaseOwner,
    FieldClaim,
    PlannedValue,
    ScheduleOf,
)
from lightning_bigopt.optimizers.group_field import separate_tensors
from lightning_bigopt.optimizers.names import group_names

__all__ = ["GroupSchedule", "PlannedValue"]

_version = attrgetter("_version")


class GroupSchedule:
    """Writes the scheduled fields of all parameter groups of one or several optimizers.

    A value is ``base × schedule(fraction)``, passed through all adjustments and limited by absolute
    bounds. It is recomputed from its base at every write, without accumulating rounding errors. The
    base of a group that is added later is its value at that time.

    Claim a field before a checkpoint is restored; :meth:`restore_bases` replaces the bases then.

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
        separate_tensors(optimizer for _, optimizer in self)
        self._groups = [list(optimizer.param_groups) for _, optimizer in self.optimizers]
        self._claims: dict[str, FieldClaim] = {}
        self._released: dict[str, list[list[float]]] = {}  # bases of fields that were claimed
        self._fraction, self._steps = 0.0, 0  # of the last write
        self._update = 0  # counts the updates for which values were written
        self._has_new_bases = self._is_restored = False

    def claim(self, name: str, *, base: BaseOwner | None = None) -> None:
        """Reads the bases of a field, at the first call.

        Args:
            name: The field, as for :class:`~lightning_bigopt.optimizers.GroupField`.
            base: Bases to use after a resume: those of the ``"checkpoint"`` or those of the
                ``"config"``. Groups that were added during the run always use those of the
                checkpoint. None keeps the previous choice, initially ``"checkpoint"``.

        Raises:
            ValueError: If a group does not have the field.
        """
        if name not in self._claims:
            self._claims[name] = FieldClaim.of(name, self.optimizers)
            self._has_new_bases = True
            self._mark()
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
        claim.schedules = [claim.schedules_of(label, o.param_groups) for label, o in self]
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
        if self.has_new_groups():
            self._follow_groups()
        self._update += progress.steps != self._steps
        self._fraction, self._steps = progress.fraction, progress.steps
        for claim in self._claims.values():
            field, key = claim.field, claim.field.key
            for index, (_, optimizer) in enumerate(self.optimizers):
                written = claim.written[index]
                groups = optimizer.param_groups
                values = _values(claim, index, len(groups), progress)
                for position, (group, value) in enumerate(zip(groups, values, strict=True)):
                    if type(group[key]) is float:
                        group[key] = written[position] = value
                    else:
                        written[position] = field.write(group, value)
        self._mark()
        if self._has_new_bases:
            self._has_new_bases = False
            if "lr" in self._claims:  # torch's schedulers read and write initial_lr, too
                self._claims["lr"].write_bases("initial_lr", self._groups)

    def _mark(self) -> None:
        for claim in self._claims.values():
            key, claim.marks = claim.field.key, []
            for groups in self._groups:
                marks: list[tuple[object, int]] = []
                for group in groups:
                    value = group.get(key)
                    marks.append((value, _version(value) if isinstance(value, Tensor) else 0))
                claim.marks.append(marks)

    def has_new_groups(self) -> bool:
        """Returns whether groups were added, removed or replaced since the last write."""
        return any(
            len(o.param_groups) != len(groups) or not all(map(is_, o.param_groups, groups))
            for groups, (_, o) in zip(self._groups, self.optimizers, strict=True)
        )

    def was_changed(self) -> bool:
        """Returns whether :meth:`adopt` may find a value or a group of other code.

        Compares identities and the versions of tensors. Does not read the device.
        """
        return self.has_new_groups() or any(
            (value := group.get(claim.field.key)) is not mark
            or (isinstance(value, Tensor) and _version(value) != version)
            for claim in self._claims.values()
            for groups, marks in zip(self._groups, claim.marks, strict=True)
            for group, (mark, version) in zip(groups, marks, strict=True)
        )

    def adopt(self) -> list[ForeignValue]:
        """Makes the values that other code has written the bases of their groups.

        Returns:
            These values.

        Raises:
            ValueError: If a value is not finite, or other code writes the field for every update.
        """
        self._follow_groups()
        found: list[ForeignValue] = []
        for claim in self._claims.values():
            found += claim.adopt(self.optimizers, update=self._update)
        self._is_restored = False
        self._has_new_bases |= bool(found)
        self._mark()
        return found

    def forget_written(self, *, only_last_lr: bool = False) -> None:
        """Makes the next :meth:`adopt` accept current values, perhaps only the last group's lr."""
        for name, claim in self._claims.items():
            if not only_last_lr:
                claim.restore_written([])
            elif name == "lr":
                claim.written = [[*written[:-1], None] for written in claim.written]

    def follow_optimizers(self, optimizers: Sequence[tuple[str, Optimizer]]) -> None:
        """Continues with other optimizers; new ones bring their own base values.

        Args:
            optimizers: Pairs of a label and an optimizer.

        Raises:
            ValueError: If a new optimizer does not have a claimed field.
        """
        known = [id(optimizer) for _, optimizer in self.optimizers]
        places = [known.index(id(o)) if id(o) in known else None for _, o in optimizers]
        for claim in self._claims.values():  # first, because one of them may raise
            FieldClaim.of(claim.field.name, optimizers)
        self.optimizers = tuple(optimizers)
        self._groups = [
            list(optimizer.param_groups) if place is None else self._groups[place]
            for place, (_, optimizer) in zip(places, optimizers, strict=True)
        ]
        for claim in self._claims.values():
            claim.follow_optimizers(self.optimizers, places)
        self._has_new_bases = True
        self._mark()

    def _follow_groups(self) -> None:
        separate_tensors(optimizer for _, optimizer in self)
        for index, (label, optimizer) in enumerate(self.optimizers):
            before, now = self._groups[index], list(optimizer.param_groups)
            places = matching_groups(before, now)
            self._groups[index] = now
            bases = self.bases("lr")[index] if "lr" in self._claims else None
            is_loaded = not self._is_restored and is_loaded_state(before, now, bases)
            for claim in self._claims.values():
                claim.follow_groups(index, label, now, places)
                if is_loaded:
                    claim.written[index] = [None] * len(now)
            self._has_new_bases |= None in places

    def planned(self, name: str, progress: Progress) -> list[PlannedValue]:
        """Computes the values of a field for the update that starts at ``progress``."""
        self._follow_groups()
        claim = self._claims.get(name)
        planned: list[PlannedValue] = []
        for index, (label, optimizer) in enumerate(self.optimizers):
            groups = optimizer.param_groups
            if claim is None:
                values = [float(g[name]) if g.get(name) is not None else None for g in groups]
            else:
                values = list(_values(claim, index, len(groups), progress))
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
        claim = self._claims[name]
        claim.bases[optimizer] = [float(base) for base in bases]
        claim.written[optimizer] = [*map(claim.field.read, self._groups[optimizer])]
        self._has_new_bases = True

    def restore_bases(self, name: str, optimizer: int, bases: Sequence[float]) -> None:
        """Replaces the bases of one optimizer by those of a checkpoint; see ``base`` of a claim."""
        self._claims[name].restore_bases(optimizer, bases)
        self._has_new_bases = True

    def state_dict(self) -> dict[str, list[list[float]]]:
        """Returns the bases of all claimed fields."""
        return {name: self.bases(name) for name in self._claims}

    def written(self) -> dict[str, list[list[float | None]]]:
        """Returns the last values of all claimed fields."""
        return {name: [list(v) for v in claim.written] for name, claim in self._claims.items()}

    def restore_written(self, state: dict[str, list[list[float | None]]]) -> None:
        """Restores the last values of a checkpoint; those of other fields are not known."""
        self._is_restored = True
        for name, claim in self._claims.items():
            claim.restore_written(state.get(name, []))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the bases of the saved fields that are claimed in this fit."""
        for name, bases in state.items():
            if name in self._claims:
                for index, values in enumerate(bases[: len(self.optimizers)]):
                    self.restore_bases(name, index, values)


def _values(claim: FieldClaim, index: int, groups: int, progress: Progress) -> Iterator[float]:
    """Computes the value of a field for each group of one optimizer."""
    fraction = progress.fraction if claim.frozen_at is None else claim.frozen_at
    schedules = claim.schedules[index]
    factors: dict[int, float] = {}  # most groups share one schedule, which is evaluated once
    for position, base in enumerate(claim.bases[index][:groups]):
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
        if claim.minimum is not None and not (schedule and fraction < schedule.warmup_end()):
            value = max(value, claim.minimum)
        yield value
