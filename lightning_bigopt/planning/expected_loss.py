"""The expected loss of a run, with a band: the prediction of a loss law."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_bigopt.arguments import explain_arguments

__all__ = ["ExpectedLoss", "ranking"]


@explain_arguments
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
        band = f"90 % band {low:.3f} to {high:.3f}"
        line = f"expected loss{of} {self.final:.3f} ({band}) after {self.updates[-1]:,} updates"
        return "\n".join([line, *(f"note: {note}" for note in self.notes)])


def ranking(expected: Sequence[ExpectedLoss]) -> list[str]:
    r"""Formats the expected losses of several runs as a table, the lowest first.

    Args:
        expected: The predictions; the first is marked as that of this run.

    Example:
        >>> runs = [
        ...     ExpectedLoss(
        ...         name=name, updates=(9,), losses=(loss,), low=(loss - 0.1,), high=(4.0,)
        ...     )
        ...     for name, loss in (("this run", 3.2), ("WarmupLinear", 3.1))
        ... ]
        >>> print("\n".join(ranking(runs)))
        schedule      expected loss  90 % band
        WarmupLinear  3.100          3.000 to 4.000
        this run      3.200          3.100 to 4.000
    """
    width = max(len(run.name) for run in expected)
    width = max(width, len("schedule"))
    lines = [f"{'schedule':<{width}}  expected loss  90 % band"]
    for run in sorted(expected, key=lambda run: run.final):
        low, high = run.final_band
        lines.append(f"{run.name:<{width}}  {run.final:<13.3f}  {low:.3f} to {high:.3f}")
    return lines
