"""Amounts consumed along a run, and their conversion from one unit to another."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import get_args

from lightning_bigopt.durations.duration import Clock
from lightning_bigopt.durations.progress import Span

__all__ = ["amounts_at_ends", "converted", "without_straight_corners"]

_TOLERANCE = 1e-9  # relative


def amounts_at_ends(spans: Sequence[Span]) -> dict[Clock, list[float]]:
    """Returns the amounts consumed at the ends of spans, by unit; empty for an unknown unit.

    Example:
        >>> amounts = amounts_at_ends([Span(updates=2, samples=8), Span(updates=1, samples=16)])
        >>> amounts["samples"], amounts["tokens"]
        ([0, 16, 32], [])
    """
    amounts: dict[Clock, list[float]] = {}
    for clock in get_args(Clock):
        each = [span.amount(clock) for span in spans]
        known = [s.updates * a for s, a in zip(spans, each, strict=True) if a is not None]
        complete = known and len(known) == len(each)
        amounts[clock] = list(accumulate(known, initial=0)) if complete else []
    return amounts


def converted(value: float, sources: Sequence[float], targets: Sequence[float]) -> float:
    """Converts an amount, counted from the start of the run, to another unit.

    Args:
        value: The amount.
        sources: Amounts at the ends of the spans in the unit of ``value``, from 0 on.
        targets: The same amounts in the other unit.

    Example:
        >>> converted(15, sources=[0, 10, 20], targets=[0, 100, 300]), converted(30, [0, 1], [0, 2])
        (200.0, 60.0)
    """
    index = max(0, bisect_right(sources, value) - 1)
    if value == sources[index]:  # exact at the ends of spans, without a rounding error
        return targets[index]
    index = min(index, len(sources) - 2)  # beyond the run the last span continues
    each = (targets[index + 1] - targets[index]) / (sources[index + 1] - sources[index])
    return targets[index] + (value - sources[index]) * each


def without_straight_corners(
    points: Sequence[tuple[float, float]],
) -> tuple[tuple[float, float], ...]:
    """Returns the corners of a line from the origin; only its ends if it is straight.

    Schedules keep their simple form on a straight line.

    Example:
        >>> without_straight_corners([(0.0, 0.0), (0.5, 1.0), (1.0, 2.0)])
        ((0.0, 0.0), (1.0, 2.0))
    """
    total = points[-1][1]
    is_straight = all(
        math.isclose(amount, share * total, abs_tol=_TOLERANCE * total) for share, amount in points
    )
    return (points[0], points[-1]) if is_straight else tuple(points)
