"""Schedules defined by a table of durations and factors: MultiStep and PiecewiseLinear."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, TypeAlias

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import check_non_negative, shown
from lightning_bigopt.durations.duration import Duration, DurationLike, amount_of
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.schedules.base import Schedule
from lightning_bigopt.schedules.part_lengths import resolved_share
from lightning_bigopt.schedules.shapes import TOLERANCE

__all__ = ["MultiStep", "PiecewiseLinear", "Table"]

Table: TypeAlias = Mapping[DurationLike, float] | Sequence[tuple[DurationLike, float]]
"""Durations and their factors; a dict is stored as a tuple of pairs, which is hashable."""


@dataclass(frozen=True, kw_only=True, repr=False)
class TableSchedule(Schedule):
    """A schedule defined by a table in the field that ``_table`` names."""

    _table: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self._table
        table: Any = getattr(self, name)
        pairs = table.items() if isinstance(table, Mapping) else table
        if not isinstance(table, Mapping | list | tuple) or not pairs:
            raise ValueError(
                f"{name} must map durations to factors, got {shown(table)}; for instance "
                f"{{'30%': 0.1}}"
            )
        read: list[tuple[Duration, float]] = []
        for pair in pairs:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise ValueError(
                    f"{name} must contain pairs (duration, factor), got {shown(pair)}; for "
                    "instance ('30%', 0.1)"
                )
            moment, factor = Duration.parse(pair[0], name=f"a key of {name}"), pair[1]
            check_non_negative(f"{name}[{str(moment)!r}]", factor)
            read.append((moment, factor))
        self._set(**{name: tuple(sorted(read, key=lambda pair: (pair[0].unit, pair[0].value)))})
        # Durations in other units are compared only after they are resolved on a horizon.
        if all(moment.unit == "fraction" for moment, _ in read):
            self._check_order()

    @property
    def _pairs(self) -> tuple[tuple[Duration, float], ...]:
        pairs: tuple[tuple[Duration, float], ...] = getattr(self, self._table)
        return pairs

    def _check_order(self) -> None:
        moments = self._columns[0]
        for (earlier, later), (moment, _) in zip(pairwise(moments), self._pairs[1:], strict=True):
            if later - earlier <= TOLERANCE:
                raise ValueError(
                    f"{self._table} must contain every duration once, got {str(moment)!r} twice; "
                    "remove one of them"
                )
        if moments[-1] > 1.0 + TOLERANCE:
            raise ValueError(
                f"{self._table} must be at most 100%, got {str(self._pairs[-1][0])!r}; shorten it"
            )

    @cached_property
    def _columns(self) -> tuple[list[float], list[float]]:
        """Fractions of the budget and factors, in ascending order."""
        name = f"{type(self).__name__}.{self._table}"
        return (
            [resolved_share(moment, name) for moment, _ in self._pairs],
            [factor for _, factor in self._pairs],
        )

    def resolve(self, horizon: Horizon) -> Schedule:
        """Converts the durations to fractions of the horizon's budget.

        Raises:
            ValueError: If a duration cannot be converted, two durations are equal, or one is longer
                than the budget (with ``overlong="compress"`` they are compressed instead).
        """
        name, pairs = self._table, self._pairs
        shares = [horizon.fraction(moment, name=name) for moment, _ in pairs]
        latest = max(shares)
        if latest > 1.0 + TOLERANCE and horizon.overlong == "raise":
            raise ValueError(
                f"{name} must be at most the whole budget "
                f"({amount_of(horizon.budget, horizon.clock)}), got "
                f"{str(pairs[shares.index(latest)][0])!r}; shorten it, or train longer"
            )
        shrink = max(latest, 1.0)
        resolved = [
            (Duration(share / shrink, "fraction"), factor)
            for share, (_, factor) in zip(shares, pairs, strict=True)
        ]
        return self._changed(**{name: tuple(sorted(resolved, key=lambda pair: pair[0].value))})

    def warmup_end(self) -> float:
        """Returns the end of the first rise as a fraction; 0.0 if it is the end of the budget."""
        end, before = 0.0, self.factor(0.0)
        for moment, after in zip(*self._columns, strict=True):
            if after < before:
                break
            if after > before:
                end = moment
            before = after
        return end if end < 1.0 - TOLERANCE else 0.0


@explain_arguments
@dataclass(frozen=True, kw_only=True, repr=False)
class MultiStep(TableSchedule):
    r"""A constant factor from each milestone on; 1 before the first.

    .. math:: s(\tau) = c_i \quad \text{for } m_i \le \tau < m_{i+1}

    The update at which a milestone is reached uses the new factor.

    Args:
        milestones: Durations :math:`m_i` from the start of training, and factors :math:`c_i`, each
            relative to the base and not to the previous factor (torch's ``gamma=0.1`` is 0.1, 0.01,
            …). An int counts updates.

    Raises:
        ValueError: If a factor is negative, or a duration is given twice or exceeds the budget.

    Example:
        >>> MultiStep({"40%": 0.1, "80%": 0.01}).values(5)
        [1.0, 1.0, 0.1, 0.1, 0.01]

    References:
        torch, ``MultiStepLR``; He et al., "Deep Residual Learning for Image Recognition", CVPR
        2016, Sec. 3.4.
    """

    _table: ClassVar[str] = "milestones"

    milestones: Table = field(default=(("30%", 0.1), ("60%", 0.01)), kw_only=False)

    def factor(self, fraction: float) -> float:
        """Evaluates the formula above; ``fraction`` in [0, 1]."""
        moments, factors = self._columns
        stage = bisect_right(moments, fraction + TOLERANCE)
        return factors[stage - 1] if stage else 1.0

    def boundaries(self) -> dict[str, float]:
        """Returns the fractions of the budget at which the stages start."""
        return {f"stage {i} starts": at for i, at in enumerate(self._columns[0], start=2)}


@explain_arguments
@dataclass(frozen=True, kw_only=True, repr=False)
class PiecewiseLinear(TableSchedule):
    r"""Straight lines between points, flat before the first and after the last.

    .. math::
        s(\tau) = c_i + (c_{i+1} - c_i) \frac{\tau - m_i}{m_{i+1} - m_i}
        \quad \text{for } m_i \le \tau < m_{i+1}

    Args:
        points: Durations :math:`m_i` from the start of training, and factors :math:`c_i`. An int
            counts updates.

    Raises:
        ValueError: If a factor is negative, or a duration is given twice or exceeds the budget.

    Example:
        >>> knee = PiecewiseLinear({"0%": 0.0, "50%": 1.0, "100%": 0.2})
        >>> [knee(tau) for tau in (0.0, 0.25, 0.5, 0.75, 1.0)]
        [0.0, 0.5, 1.0, 0.6, 0.2]

    References:
        torch, ``LinearLR``, for one line; numpy, ``interp``.
    """

    _table: ClassVar[str] = "points"

    points: Table = field(default=(("0%", 1.0), ("100%", 0.0)), kw_only=False)

    def factor(self, fraction: float) -> float:
        """Evaluates the formula above; ``fraction`` in [0, 1]."""
        moments, factors = self._columns
        right = bisect_right(moments, fraction)
        if right == 0:
            return factors[0]
        if right == len(moments):
            return factors[-1]
        left = right - 1
        inside = (fraction - moments[left]) / (moments[right] - moments[left])
        return factors[left] * (1.0 - inside) + factors[right] * inside

    def boundaries(self) -> dict[str, float]:
        """Returns the fractions of the budget at the corners."""
        inner = [at for at in self._columns[0] if 0.0 < at < 1.0]
        return {f"corner {number}": at for number, at in enumerate(inner, start=1)}
