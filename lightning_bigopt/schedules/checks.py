"""What the schedules share below their base class: curves, positions, and checks of arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

from lightning_bigopt.durations import Duration, DurationLike

__all__ = ["COOLDOWNS", "SNAP", "CooldownShape", "WarmupShape"]

CooldownShape: TypeAlias = Literal["linear", "cosine", "1-sqrt", "exponential"]
"""How a cooldown falls from 1 to 0 while its own position r runs from 0 to 1."""

WarmupShape: TypeAlias = Literal["linear", "cosine", "1-sqrt"]
"""How a warm-up rises from 0 to 1: the cooldown of that name run backwards, 1 - r for r."""

COOLDOWNS: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {
        "linear": lambda r: 1.0 - r,
        "cosine": lambda r: 0.5 * (1.0 + math.cos(math.pi * r)),
        "1-sqrt": lambda r: 1.0 - math.sqrt(r),
        "exponential": lambda r: 2.0 * 0.5**r - 1.0,
    }
)

SNAP = 1e-9
"""Positions that differ by less are the same: far above rounding, far below one update."""


def position(fraction: float, begin: float, length: float) -> float:
    """Where ``fraction`` lies in a part: 0 to 1, exactly 0 and 1 at its ends despite rounding."""
    inside = (fraction - begin) / length if length > SNAP else 0.0
    if inside < SNAP:
        return 0.0
    return inside if inside < 1.0 - SNAP else 1.0


def resolved_share(length: DurationLike, name: str) -> float:
    """A duration's fraction of the budget.

    Raises:
        ValueError: If it is in another unit.
    """
    duration = Duration.parse(length, name=name)
    if duration.unit != "fraction":
        raise ValueError(
            f"{name} must be resolved before the schedule is called, got {str(duration)!r}; call "
            "schedule.resolve(horizon) first, for instance with Horizon.of_steps(1000)"
        )
    return duration.value


def check_fit(lengths: Mapping[str, Duration]) -> None:
    """Refuses parts that cannot fit into any budget together."""
    known = {name: length for name, length in lengths.items() if length.unit == "fraction"}
    if math.fsum(length.value for length in known.values()) > 1.0 + SNAP:
        written = " + ".join(f"{name}={str(length)!r}" for name, length in known.items())
        raise ValueError(
            f"{' + '.join(known)} must be at most 100%, got {written}; shorten "
            f"{'one of them' if len(known) > 1 else 'it'}"
        )


def check_non_negative(**factors: float) -> None:
    """Refuses what is not a finite number from 0 on."""
    given: Mapping[str, Any] = factors
    for name, value in given.items():
        if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number from 0 on, got {value!r}")


def check_end(end: float) -> None:
    """Refuses the end of a decay that is not a factor from 0 to 1."""
    check_non_negative(end=end)
    if end > 1:
        raise ValueError(f"end must be at most 1, the peak, got {end!r}")


def check_choice(name: str, value: str, choices: Any) -> None:
    """Refuses what is not one of a Literal's words."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")
