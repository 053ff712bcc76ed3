"""Schedules made of schedules."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

from lightning_bigopt.durations import Duration, DurationLike, Horizon
from lightning_bigopt.schedules.base import Schedule, check_schedule
from lightning_bigopt.schedules.checks import (
    COOLDOWNS,
    SNAP,
    WarmupShape,
    check_choice,
    check_non_negative,
    position,
)

__all__ = ["Clamp", "Composition", "Product", "Warmup"]


class Composition(Schedule):
    """What compositions share: the factor is the value at base 1, where that means anything."""

    @abstractmethod
    def scaled(self, fraction: float, base: float) -> float:
        """The value at a ``fraction`` in [0, 1]."""

    def factor(self, fraction: float) -> float:
        """The factor at a ``fraction`` in [0, 1].

        Raises:
            ValueError: If a bound inside is an absolute value, so that there is no factor.
        """
        if self.needs_base:
            raise ValueError(
                f"{type(self).__name__} must be given a base value, because it holds "
                "Clamp(unit='lr'), got none; call schedule.value(fraction, base)"
            )
        return self.scaled(fraction, 1.0)


@dataclass(frozen=True, kw_only=True, repr=False)
class Warmup(Composition):
    r"""A rise from ``start`` to where ``schedule`` begins, then ``schedule`` on its own 0 … 1.

    .. math::
        s(\tau) = \begin{cases}
            b + w(\tau / d)\,(s_0(0) - b) & \tau < d \\
            s_0\bigl((\tau - d) / (1 - d)\bigr) & \text{else}
        \end{cases}

    Update 0 sees exactly ``start``, the first update after the warm-up exactly :math:`s_0(0)`, as
    in transformers' ``get_*_schedule_with_warmup``. Inside ``schedule`` a percentage is a share of
    what the warm-up leaves, and other durations are counted from its end.

    Args:
        duration: Length :math:`d` of the warm-up.
        schedule: The schedule :math:`s_0` after it.
        shape: The rise :math:`w`: ``"linear"`` :math:`r`, ``"cosine"``
            :math:`\tfrac12 (1 - \cos \pi r)` or ``"1-sqrt"`` :math:`1 - \sqrt{1 - r}`.
        start: Factor :math:`b` at update 0, dimensionless.

    Raises:
        ValueError: If ``shape`` is unknown, ``start`` is negative, or the warm-up is longer than
            the budget.

    Example:
        >>> from lightning_bigopt.schedules import Linear
        >>> Warmup("50%", Linear()).values(8)
        [0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]

    References:
        Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017, Sec. 2.2.
    """

    _parts: ClassVar[tuple[str, ...]] = ("duration",)

    duration: DurationLike = field(kw_only=False)
    schedule: Schedule = field(kw_only=False)
    shape: WarmupShape = "linear"
    start: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_schedule("schedule", self.schedule)
        check_choice("shape", self.shape, WarmupShape)
        check_non_negative(start=self.start)

    @cached_property
    def _length(self) -> float:
        return self._share("duration")

    def _inner(self) -> tuple[Schedule, ...]:
        return (self.schedule,)

    def scaled(self, fraction: float, base: float) -> float:
        """Follows the formula above, times ``base``; ``fraction`` in [0, 1]."""
        length = self._length
        risen = position(fraction, 0.0, length) if fraction < length else 1.0
        if risen == 1.0:
            return self.schedule.scaled(position(fraction, length, 1.0 - length), base)
        start = self.start * base
        rise = risen if self.shape == "linear" else COOLDOWNS[self.shape](1.0 - risen)
        return start + rise * (self.schedule.scaled(0.0, base) - start)

    def resolve(self, horizon: Horizon) -> Schedule:
        """The same on resolved parts, each on its own part of the horizon."""
        (length,) = horizon.shares({"duration": self.duration})
        rest = window(horizon, length, 1.0 - length)
        return self._changed(
            duration=Duration(length, "fraction"), schedule=self.schedule.resolve(rest)
        )

    def boundaries(self) -> dict[str, float]:
        """The seams of the parts, and those between them."""
        length = self._length
        later = {n: length + at * (1.0 - length) for n, at in self.schedule.boundaries().items()}
        return {"warmup ends": length, **later} if length else later


@dataclass(frozen=True, kw_only=True)
class Product(Composition):
    r"""Several schedules at once, multiplied.

    .. math:: s(\tau) = \prod_i s_i(\tau)

    Args:
        schedules: The factors; each sees the whole budget.

    Raises:
        ValueError: If there is none, or one is bounded in absolute terms: the bound then belongs
            around the product, ``Clamp(Product([...]), unit="lr")``.

    Example:
        >>> from lightning_bigopt.schedules import Linear, MultiStep
        >>> Product([Linear(), MultiStep({"40%": 0.5})])(0.5)
        0.25

    References:
        torch, ``ChainedScheduler``.
    """

    schedules: Sequence[Schedule] = field(kw_only=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        schedules: Any = self.schedules
        if not isinstance(schedules, list | tuple) or not schedules:
            raise ValueError(f"schedules must be a list of schedules, got {schedules!r}")
        for index, schedule in enumerate(schedules):
            check_schedule(f"schedules[{index}]", schedule)
            if schedule.needs_base:
                raise ValueError(
                    f"schedules[{index}] must not hold Clamp(unit='lr'), got {schedule!r}; put the "
                    "bound around the product: Clamp(Product([...]), unit='lr', ...)"
                )
        self._set(schedules=tuple(schedules))

    def scaled(self, fraction: float, base: float) -> float:
        """Follows the formula above, times ``base``; ``fraction`` in [0, 1]."""
        for schedule in self.schedules:
            base *= schedule.factor(fraction)
        return base

    def _inner(self) -> tuple[Schedule, ...]:
        return tuple(self.schedules)

    def resolve(self, horizon: Horizon) -> Schedule:
        """The same on resolved parts, each on its own part of the horizon."""
        return self._changed(schedules=tuple([s.resolve(horizon) for s in self.schedules]))

    def boundaries(self) -> dict[str, float]:
        """The seams of the parts, and those between them."""
        return {
            f"schedule {number}: {name}": at
            for number, schedule in enumerate(self.schedules, start=1)
            for name, at in schedule.boundaries().items()
        }


@dataclass(frozen=True, kw_only=True)
class Clamp(Composition):
    r"""A schedule kept between bounds: learning-rate clipping.

    .. math:: s(\tau) = \min(\max(s_0(\tau), l), h)

    With ``unit="lr"`` the bounds hold for the value itself, base times factor, so that there is no
    factor: only :meth:`value` is defined. It composes with Warmup, Chain and Clamp; a Product or a
    Seesaw goes inside it.

    Args:
        schedule: The schedule :math:`s_0`.
        low: Lower bound :math:`l`; None for none.
        high: Upper bound :math:`h`; None for none.
        unit: ``"factor"``, or ``"lr"`` for bounds on the scheduled value.

    Raises:
        ValueError: If there is no bound, one is negative, or ``low`` exceeds ``high``.

    Example:
        >>> from lightning_bigopt.schedules import Linear
        >>> Clamp(Linear(), low=0.1)(0.95)
        0.1
        >>> Clamp(Linear(), low=1e-5, unit="lr").value(0.999, base=1e-3)
        1e-05
    """

    schedule: Schedule = field(kw_only=False)
    low: float | None = None
    high: float | None = None
    unit: Literal["factor", "lr"] = "factor"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_schedule("schedule", self.schedule)
        check_choice("unit", self.unit, Literal["factor", "lr"])
        bounds = {"low": self.low, "high": self.high}
        given = {name: bound for name, bound in bounds.items() if bound is not None}
        check_non_negative(**given)
        if not given:
            raise ValueError("low or high must be given, got None for both")
        if given.get("low", 0.0) > given.get("high", math.inf):
            raise ValueError(f"low must be at most high, got low={self.low} and high={self.high}")

    @cached_property
    def needs_base(self) -> bool:
        """Whether only :meth:`value` is defined, because a bound is an absolute value."""
        return self.unit == "lr" or self.schedule.needs_base

    def _inner(self) -> tuple[Schedule, ...]:
        return (self.schedule,)

    def scaled(self, fraction: float, base: float) -> float:
        """Follows the formula above, times ``base``; ``fraction`` in [0, 1]."""
        value = self.schedule.scaled(fraction, base)
        scale = 1.0 if self.unit == "lr" else base
        if self.low is not None:
            value = max(value, self.low * scale)
        if self.high is not None:
            value = min(value, self.high * scale)
        return value

    def resolve(self, horizon: Horizon) -> Schedule:
        """The same on resolved parts, each on its own part of the horizon."""
        return self._changed(schedule=self.schedule.resolve(horizon))

    def boundaries(self) -> dict[str, float]:
        """The seams of the parts, and those between them."""
        return self.schedule.boundaries()


def window(horizon: Horizon, begin: float, length: float) -> Horizon:
    """A part of a horizon; a part without length is never entered, and any horizon will do."""
    return horizon.span(begin, begin + length) if length > SNAP else horizon
