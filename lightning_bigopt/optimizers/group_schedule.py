"""Writes scheduled fields of parameter groups: base × schedule, adjustments, then bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_bigopt.durations.progress import Progress
from lightning_bigopt.optimizers.base_values import (
    ForeignValue,
    is_loaded_state,
    matching_groups,
    separate_tensors,
)
from lightning_bigopt.optimizers.claimed_fields import ClaimedFields
from lightning_bigopt.optimizers.field_claim import BaseOwner, FieldClaim, PlannedValue
from lightning_bigopt.optimizers.names import group_names

__all__ = ["GroupSchedule", "PlannedValue"]

_version = attrgetter("_version")


class GroupSchedule(ClaimedFields):
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
        super().__init__(optimizers)
        self._steps: int | None = None  # of the last write
        self._update = 0  # counts the updates for which values were written
        self._stepped = False  # whether an update may have used values of other code
        self._hooks: list[RemovableHandle] = []

    def claim(self, name: str, *, base: BaseOwner | None = None) -> None:
        """Reads the bases of a field, at the first call.

        Args:
            name: The field, as for :class:`~lightning_bigopt.optimizers.GroupField`.
            base: Bases to use after a resume: those of the ``"checkpoint"`` or those of the
                ``"config"``. Groups that were added during the run always use those of the
                checkpoint. None keeps the previous choice, initially ``"checkpoint"``.

        Raises:
            ValueError: If no group of an optimizer has the field, or an optimizer schedules it
                itself.
        """
        if name not in self._claims:
            _check_not_scheduled(name, self.optimizers)
            self._claims[name] = FieldClaim.of(name, self.optimizers)
            self._has_new_bases = True
            self._mark()
        self._claims[name].base = base or self._claims[name].base

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
        self._update += self._steps not in (None, progress.steps)
        self._fraction, self._steps = progress.fraction, progress.steps
        for claim in self._claims.values():
            field, key = claim.field, claim.field.key
            for index, (_, optimizer) in enumerate(self.optimizers):
                written = claim.written[index]
                groups = optimizer.param_groups
                values = _values(claim, index, len(groups), progress)
                for position, (group, value) in enumerate(zip(groups, values, strict=True)):
                    if key not in group:
                        continue
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
        return self._stepped or self._was_written() or self.has_new_groups()

    def _was_written(self) -> bool:
        return any(
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
            ValueError: If a value is not finite, or other code writes the field for two updates in
                a row.
        """
        self._follow_groups()
        found: list[ForeignValue] = []
        for claim in self._claims.values():
            found += claim.adopt(self.optimizers, update=self._update)
        self._is_restored = self._stepped = False
        self._has_new_bases |= bool(found)
        self._mark()
        return found

    def watch_steps(
        self, optimizers: Iterable[Optimizer], *, is_watched: Callable[[], bool]
    ) -> None:
        """Notes values of other code that updates use, until :meth:`ignore_steps`.

        Other code may write them after :meth:`adopt`, and restore them before the next call.

        Args:
            optimizers: The optimizers whose steps are watched.
            is_watched: Returns False while steps are not those of the run.
        """
        self.ignore_steps()
        after_step = partial(self._after_step, is_watched)
        for optimizer in optimizers:
            # An optimizer that does not call Optimizer.__init__ may have no hooks, or a plain dict.
            with suppress(AttributeError, TypeError):
                self._hooks.append(optimizer.register_step_post_hook(after_step))

    def ignore_steps(self) -> None:
        """Removes the hooks of :meth:`watch_steps`."""
        while self._hooks:
            self._hooks.pop().remove()

    def _after_step(self, is_watched: Callable[[], bool], optimizer: Optimizer, *args: Any) -> None:
        # A step that is compiled with this hook would be compiled again for each learning rate.
        if torch.compiler.is_compiling() or not is_watched():
            return
        if not self._was_written() or self.has_new_groups():
            return
        for index, (_, one) in enumerate(self.optimizers):
            if one is optimizer:
                self._stepped = True
                for claim in self._claims.values():
                    claim.note_step(index, one.param_groups)

    def rewind(self, bases: Mapping[str, Sequence[Sequence[float]]]) -> None:
        """Returns to earlier bases, after the groups have returned to their earlier values.

        Groups that were added since then keep their bases.

        Args:
            bases: The result of :meth:`state_dict`.
        """
        self._follow_groups()
        for name, saved in bases.items():
            if name in self._claims:
                for of_optimizer, values in zip(self._claims[name].bases, saved, strict=True):
                    of_optimizer[: len(values)] = values
        self.forget_written()
        self._has_new_bases = True

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
        """Computes the planned values of a field for the update that starts at ``progress``.

        Adjustments that depend on measurements are left out.
        """
        self._follow_groups()
        claim = self._claims.get(name)
        planned: list[PlannedValue] = []
        for index, (label, optimizer) in enumerate(self.optimizers):
            groups = optimizer.param_groups
            if claim is None:
                values = [float(g[name]) if g.get(name) is not None else None for g in groups]
            else:
                planned_values = _values(claim, index, len(groups), progress, is_planned=True)
                values = [
                    value if claim.field.key in group else None
                    for group, value in zip(groups, planned_values, strict=True)
                ]
            planned += [
                PlannedValue(label, group, value)
                for group, value in zip(group_names(groups), values, strict=True)
                if value is not None  # the lr of Adafactor(relative_step=True), for example
            ]
        return planned


def _check_not_scheduled(name: str, optimizers: Iterable[tuple[str, Optimizer]]) -> None:
    for _, optimizer in optimizers:
        if name in getattr(optimizer, "scheduled_fields", ()):
            raise ValueError(
                f"{name} must have one writer, got {type(optimizer).__name__}, which schedules it "
                f"itself, and a schedule; switch off its own ({name}_warmup=0), or remove the "
                "schedule"
            )


def _values(
    claim: FieldClaim, index: int, groups: int, progress: Progress, *, is_planned: bool = False
) -> Iterator[float]:
    """Computes the value of a field for each group of one optimizer, or the planned value."""
    left_out = claim.unplanned if is_planned else ()
    adjustments = [a for owner, a in claim.adjustments.items() if owner not in left_out]
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
        for adjustment in adjustments:
            value = adjustment(value, progress)
        if claim.maximum is not None:
            value = min(value, claim.maximum)
        if claim.minimum is not None and not (schedule and fraction < schedule.warmup_end()):
            value = max(value, claim.minimum)
        yield value
