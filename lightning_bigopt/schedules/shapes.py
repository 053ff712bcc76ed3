"""Curves of warm-ups and cooldowns, and the position inside a part of the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, TypeAlias

__all__ = ["COOLDOWNS", "TOLERANCE", "CooldownShape", "WarmupShape", "position"]

CooldownShape: TypeAlias = Literal["linear", "cosine", "1-sqrt", "exponential"]
"""Names of curves that fall from 1 to 0 while the position r in the cooldown rises from 0 to 1."""

WarmupShape: TypeAlias = Literal["linear", "cosine", "1-sqrt"]
"""Names of the curves that rise from 0 to 1: the cooldown of that name at 1 - r."""

COOLDOWNS: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {
        "linear": lambda r: 1.0 - r,
        "cosine": lambda r: 0.5 * (1.0 + math.cos(math.pi * r)),
        "1-sqrt": lambda r: 1.0 - math.sqrt(r),
        "exponential": lambda r: 2.0 * 0.5**r - 1.0,
    }
)

TOLERANCE = 1e-9
"""Fractions that differ by less are equal: far more than rounding, far less than one update."""


def position(fraction: float, begin: float, length: float) -> float:
    """Returns the position of ``fraction`` in a part of the budget, from 0 to 1.

    Args:
        fraction: Fraction of the budget consumed.
        begin: Fraction of the budget at which the part begins.
        length: Fraction of the budget that the part takes.

    Returns:
        Exactly 0 and 1 within :data:`TOLERANCE` of the ends of the part, and beyond them.

    Example:
        >>> position(0.5, 0.25, 0.5), position(0.1 + 0.2, 0.1, 0.2), position(0.9, 0.25, 0.5)
        (0.5, 1.0, 1.0)
    """
    inside = (fraction - begin) / length if length > TOLERANCE else 0.0
    if inside < TOLERANCE:
        return 0.0
    return inside if inside < 1.0 - TOLERANCE else 1.0
