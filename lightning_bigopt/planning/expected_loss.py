"""The expected loss of a run, with a band: the prediction of a loss law."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ExpectedLoss"]


@dataclass(frozen=True, kw_only=True)
class ExpectedLoss:
    """The expected loss of a run after several numbers of updates, with a band of 90 %.

    Args:
        name: Name of the run or its schedule.
        updates: Numbers of updates, ascending; the last is the length of the run.
        losses: Expected loss after each, in units of the loss.
        low: Lower end of the band after each.
        high: Upper end of the band after each.
        notes: One sentence for each reason to doubt the prediction.

    Example:
        >>> expected = ExpectedLoss(
        ...     updates=(500, 1000), losses=(3.5, 3.2), low=(3.4, 3.1), high=(3.6, 3.3)
        ... )
        >>> print(expected)
        expected loss 3.200 (90 % band 3.100 to 3.300) after 1,000 updates
    """

    updates: tuple[int, ...]
    losses: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    name: str = ""
    notes: tuple[str, ...] = ()

    @property
    def final(self) -> float:
        """The expected loss at the end of the run."""
        return self.losses[-1]

    @property
    def final_band(self) -> tuple[float, float]:
        """The band at the end of the run."""
        return self.low[-1], self.high[-1]

    def __str__(self) -> str:
        low, high = self.final_band
        of = f" of {self.name}" if self.name else ""
        lines = [
            f"expected loss{of} {self.final:.3f} (90 % band {low:.3f} to {high:.3f}) after "
            f"{self.updates[-1]:,} updates"
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
