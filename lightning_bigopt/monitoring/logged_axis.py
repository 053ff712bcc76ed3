"""The step at which the values of an update are logged."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from lightning_bigopt.engine.amounts import RunAmounts
from lightning_bigopt.engine.stage import Fit
from lightning_bigopt.trainer_access import loop

__all__ = ["LoggedAxis", "XAxis"]

XAxis: TypeAlias = Literal["updates", "samples", "tokens"]


class LoggedAxis:
    """The x axis of the loggers, which goes on when a rollback sets the counts of the run back.

    Args:
        unit: Unit of the steps.

    Attributes:
        offset: Amount that rollbacks have undone, in that unit.
        updates: The same in updates.
    """

    def __init__(self, unit: XAxis) -> None:
        self.unit, self.offset, self.updates = unit, 0, 0
        self._counts = RunAmounts()

    def after_update(self, fit: Fit) -> int:
        """Returns the step of the current update, after it."""
        # Lightning's own count of updates goes on at a rollback.
        if self.unit == "updates":
            return loop.batches_that_stepped(fit.trainer)
        return int(getattr(fit.clock, self.unit)) + self.offset

    def before_step(self, fit: Fit) -> int:
        """Returns the step of the current update, before the optimizer's step."""
        if self.unit == "updates":
            return loop.batches_that_stepped(fit.trainer)
        return int(getattr(fit.clock.progress(), self.unit)) + self.offset

    def next_update(self, fit: Fit) -> int:
        """Returns the first step of the next update, before its first batch."""
        if self.unit == "updates":
            return loop.next_logger_step(fit.trainer)
        return int(getattr(fit.clock, self.unit)) + self.offset + 1

    def mark(self, fit: Fit) -> None:
        """Records the counts at the end of an update."""
        self._counts = fit.clock.counts()

    def go_on(self, fit: Fit) -> RunAmounts:
        """Keeps the axis after the counts were set back; returns by how much they were."""
        undone = self._counts.since(fit.clock.counts())
        amount = undone.steps if self.unit == "updates" else int(getattr(undone, self.unit))
        self.updates += max(0, undone.steps)
        self.offset += max(0, amount)
        return undone

    def state_dict(self) -> dict[str, Any]:
        """Returns unit and amounts."""
        return {"unit": self.unit, "offset": self.offset, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the amounts; the offset only if the unit is the same."""
        self.offset = state["offset"] if state["unit"] == self.unit else 0
        self.updates = state["updates"]
