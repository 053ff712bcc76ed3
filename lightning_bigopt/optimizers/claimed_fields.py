"""The claimed fields of parameter groups: their bases, schedules, and the values written last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_bigopt.optimizers.base_values import remember_bases, separate_tensors
from lightning_bigopt.optimizers.field_claim import Adjustment, FieldClaim, ScheduleOf

__all__ = ["ClaimedFields"]


class ClaimedFields:
    """Bases and schedules of fields of all parameter groups of one or several optimizers.

    Args:
        optimizers: Pairs of a label and an optimizer.
    """

    def __init__(self, optimizers: Sequence[tuple[str, Optimizer]]) -> None:
        self.optimizers = tuple(optimizers)
        separate_tensors(optimizer for _, optimizer in self.optimizers)
        self._groups = [list(optimizer.param_groups) for _, optimizer in self.optimizers]
        self._claims: dict[str, FieldClaim] = {}
        self._released: dict[str, list[list[float]]] = {}  # bases of fields that were claimed
        self._fraction = 0.0  # of the last write
        self._has_new_bases = self._is_restored = False

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
        claim.schedules = [
            claim.schedules_of(label, optimizer.param_groups)
            for label, optimizer in self.optimizers
        ]
        claim.minimum, claim.maximum = minimum, maximum

    def adjust(
        self, name: str, adjustment: Adjustment, *, owner: object, is_planned: bool = True
    ) -> None:
        """Adds an adjustment to a claimed field; it is applied after the schedule.

        Args:
            name: The field.
            adjustment: Returns the adjusted value of a value, at a progress.
            owner: The object to pass to :meth:`release` to undo it.
            is_planned: Whether the adjustment is known in advance. One that depends on
                measurements, such as a backoff, is left out of planned values.
        """
        claim = self._claims[name]
        claim.adjustments[id(owner)] = adjustment
        claim.unplanned.discard(id(owner))
        if not is_planned:
            claim.unplanned.add(id(owner))

    def release(self, owner: object) -> None:
        """Removes the schedules and adjustments of an owner; scheduled values are kept."""
        for name, claim in list(self._claims.items()):
            claim.adjustments.pop(id(owner), None)
            claim.unplanned.discard(id(owner))
            if claim.owner == id(owner):
                claim.owner = claim.minimum = claim.maximum = None
                claim.frozen_at = self._fraction
            if claim.owner is None and not claim.adjustments:
                self._released[name] = self._claims.pop(name).bases

    def forget_written(self, *, only_last_lr: bool = False) -> None:
        """Makes the next :meth:`adopt` accept current values, perhaps only the last group's lr."""
        for name, claim in self._claims.items():
            if not only_last_lr:
                claim.restore_written([])
            elif name == "lr":
                claim.written = [[*written[:-1], None] for written in claim.written]

    def foreign_updates(self, name: str) -> int:
        """Returns the number of updates before which other code has changed a claimed field."""
        return self._claims[name].foreign_updates

    def adopted(self, name: str) -> set[tuple[int, int]]:
        """Returns the positions, optimizer and group, of the values that were adopted last."""
        return self._claims[name].adopted

    def bases(self, name: str) -> list[list[float]]:
        """Returns the bases of a claimed or released field, one list for each optimizer."""
        claim = self._claims.get(name)
        return [list(bases) for bases in (self._released[name] if claim is None else claim.bases)]

    def set_bases(self, name: str, optimizer: int, bases: Sequence[float]) -> None:
        """Replaces the bases of the groups of one optimizer, given by its index."""
        claim = self._claims[name]
        claim.bases[optimizer] = [float(base) for base in bases]
        claim.written[optimizer] = [*map(claim.field.read, self._groups[optimizer])]
        claim.notes.pop(id(self.optimizers[optimizer][1]), None)
        self._has_new_bases = True

    def take_notes(self) -> list[str]:
        """Returns lines about base values that may not be the configured ones, and clears them."""
        notes = [note for claim in self._claims.values() for note in claim.notes.values() if note]
        for claim in self._claims.values():
            claim.notes.clear()
        return notes

    def remember(self, index: int) -> None:
        """Stores the bases and the values written last on an optimizer, given by its index."""
        optimizer = self.optimizers[index][1]
        for name, claim in self._claims.items():
            values, bases = claim.written[index], claim.bases[index]
            remember_bases(optimizer, name, values=values, bases=bases)

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
