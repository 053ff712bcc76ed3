"""Sizes that hold from one threshold to the next, in any mix of units."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from lightning_bigopt.durations import Duration, Progress, Unit

__all__ = ["Staircase"]

_SLACK = 1 - 1e-12
"""Shares are quotients: 0.3 of the budget may arrive as 0.3 less one rounding error."""


class Staircase:
    """A size that changes at thresholds; of those reached, the last as written holds.

    Args:
        stairs: Pairs of threshold and size, thresholds of one unit in ascending order.

    Attributes:
        sizes: The sizes as written.
        marks: By unit, the amounts at which a stair begins (``>=``) and the stairs' indices.

    Example:
        >>> stairs = Staircase([(Duration(0, "fraction"), 32), (Duration(0.5, "fraction"), 64)])
        >>> stairs.at(Progress(fraction=0.49)), stairs.at(Progress(fraction=0.5))
        (32, 64)
    """

    def __init__(self, stairs: Sequence[tuple[Duration, int]]) -> None:
        self.sizes = tuple(size for _, size in stairs)
        self.marks: dict[Unit, tuple[list[float], list[int]]] = {}
        for index, (threshold, _) in enumerate(stairs):
            is_share = threshold.unit in ("fraction", "epochs")
            mark = threshold.value * _SLACK if is_share else threshold.value
            marks, indices = self.marks.setdefault(threshold.unit, ([], []))
            marks.append(mark)
            indices.append(index)

    def at(self, progress: Progress) -> int:
        """The size that holds at ``progress``."""
        reached = 0
        for unit, (marks, indices) in self.marks.items():
            passed = bisect_right(marks, progress.consumed(unit))
            if passed:
                reached = max(reached, indices[passed - 1])
        return self.sizes[reached]
