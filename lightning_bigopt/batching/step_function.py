"""A piecewise-constant batch size whose thresholds may be in different units."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from lightning_bigopt.durations.duration import Duration, Unit
from lightning_bigopt.durations.progress import Progress

__all__ = ["StepFunction", "threshold_of"]

# Fractions are quotients: 0.3 of the budget may be computed as 0.3 minus a rounding error.
_TOLERANCE = 1 - 1e-12


class StepFunction:
    """A piecewise-constant size; the last threshold reached, in the order written, applies.

    Args:
        steps: Pairs of threshold and size; the thresholds of each unit must ascend.

    Attributes:
        sizes: The sizes, in the order written.
        thresholds: By unit, the amounts from which (``>=``) a step applies, and the indices of
            these steps in ``sizes``.

    Example:
        >>> steps = StepFunction([(Duration(0, "fraction"), 32), (Duration(0.5, "fraction"), 64)])
        >>> steps.at(Progress(fraction=0.49)), steps.at(Progress(fraction=0.5))
        (32, 64)
    """

    def __init__(self, steps: Sequence[tuple[Duration, int]]) -> None:
        self.sizes = tuple(size for _, size in steps)
        self.thresholds: dict[Unit, tuple[list[float], list[int]]] = {}
        for index, (threshold, _) in enumerate(steps):
            amount = threshold_of(threshold.value, threshold.unit)
            amounts, indices = self.thresholds.setdefault(threshold.unit, ([], []))
            amounts.append(amount)
            indices.append(index)

    def at(self, progress: Progress) -> int:
        """Returns the size that applies at ``progress``."""
        reached = 0
        for unit, (amounts, indices) in self.thresholds.items():
            passed = bisect_right(amounts, progress.consumed(unit))
            if passed:
                reached = max(reached, indices[passed - 1])
        return self.sizes[reached]


def threshold_of(amount: float, unit: Unit) -> float:
    """Returns the consumed amount from which on a threshold counts as reached.

    Example:
        >>> threshold_of(100, "steps"), threshold_of(0.5, "fraction") < 0.5
        (100, True)
    """
    return amount * _TOLERANCE if unit in ("fraction", "epochs") else amount
