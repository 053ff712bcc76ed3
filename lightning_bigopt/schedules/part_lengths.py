"""Lengths of the parts of a schedule: their sum, their resolved values, their horizons."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning_bigopt.durations.duration import Duration, DurationLike
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.schedules.shapes import TOLERANCE

_SHORTEST = 1e-15
"""Durations of periods below it count as zero: the number of periods would exceed all floats."""

__all__ = ["check_fit", "check_longer_than_zero", "part_horizon", "resolved_share"]


def check_fit(lengths: Mapping[str, Duration]) -> None:
    """Raises if the durations in percent take more than the whole budget together.

    Example:
        >>> check_fit({"warmup": Duration.parse("70%"), "decay": Duration.parse("40%")})
        Traceback (most recent call last):
        ValueError: warmup + decay must be at most 100%, got warmup='70%' + decay='40%'; shorten \
one of them
    """
    known = {name: length for name, length in lengths.items() if length.unit == "fraction"}
    if math.fsum(length.value for length in known.values()) > 1.0 + TOLERANCE:
        written = " + ".join(f"{name}={str(length)!r}" for name, length in known.items())
        raise ValueError(
            f"{' + '.join(known)} must be at most 100%, got {written}; shorten "
            f"{'one of them' if len(known) > 1 else 'it'}"
        )


def check_longer_than_zero(name: str, length: DurationLike) -> None:
    """Raises unless a duration is longer than zero.

    Example:
        >>> check_longer_than_zero("every", 0)
        Traceback (most recent call last):
        ValueError: every must be longer than zero, got '0 steps'; for instance '1%'
    """
    duration = Duration.parse(length, name=name)
    if duration.value < _SHORTEST:
        raise ValueError(
            f"{name} must be longer than zero, got {str(duration)!r}; for instance '1%'"
        )


def resolved_share(length: DurationLike, name: str) -> float:
    """Returns a resolved duration as a fraction of the budget.

    Raises:
        ValueError: If the duration is in another unit than a fraction of the budget.

    Example:
        >>> resolved_share("20%", "warmup")
        0.2
    """
    duration = Duration.parse(length, name=name)
    if duration.unit != "fraction":
        raise ValueError(
            f"{name} must be resolved before the schedule is called, got {str(duration)!r}; call "
            "schedule.resolve(horizon) first, for instance with Horizon.of_steps(1000)"
        )
    return duration.value


def part_horizon(horizon: Horizon, begin: float, length: float) -> Horizon:
    """Returns a part of a horizon as a separate horizon.

    Args:
        horizon: The whole horizon.
        begin: Fraction of the budget at which the part begins.
        length: Fraction of the budget that the part takes.

    Returns:
        The part; the whole horizon for a part of length zero, which is never evaluated.

    Example:
        >>> part_horizon(Horizon.of_steps(1000), 0.5, 0.25).budget
        250.0
    """
    return horizon.span(begin, begin + length) if length > TOLERANCE else horizon
