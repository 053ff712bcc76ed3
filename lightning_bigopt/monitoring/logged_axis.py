"""The step at which the values of an update are logged."""

from __future__ import annotations

from typing import Literal, TypeAlias

from lightning_bigopt.engine.amounts import RunAmounts
from lightning_bigopt.engine.stage import Fit
from lightning_bigopt.trainer_access import loop

__all__ = ["LoggedAxis", "XAxis"]

XAxis: TypeAlias = Literal["updates", "samples", "tokens"]


class LoggedAxis:
    """The x axis of the loggers, which goes on when a rollback sets the counts of the run back.

    Args:
        unit: Unit of the steps.
        offset: Amount that rollbacks have undone, in that unit; 0 for updates, which Lightning
            counts on.
    """

    def __init__(self, unit: XAxis, offset: int = 0) -> None:
        self.unit, self.offset = unit, offset
        self._counts = RunAmounts()

    def after_update(self, fit: Fit) -> int:
        """Returns the step of the current update, after it."""
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
        self.offset += 0 if self.unit == "updates" else int(getattr(undone, self.unit))
        return undone
