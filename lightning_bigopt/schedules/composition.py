"""Schedules made of schedules: Warmup, Product and Clamp."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import check_choice, check_non_negative, shown
from lightning_bigopt.durations.duration import Duration, DurationLike
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.schedules.base import Schedule, check_schedule
from lightning_bigopt.schedules.part_lengths import part_horizon
from lightning_bigopt.schedules.shapes import COOLDOWNS, WarmupShape, position

__all__ = ["Clamp", "Product", "Warmup"]


@explain_arguments
@dataclass(frozen=True, kw_only=True, repr=False)
class Warmup(Schedule):
    r"""A rise from ``start`` to the first factor of ``schedule``, then ``schedule``.

    .. math::
        s(\tau) = \begin{cases}
            b + w(\tau / d)\,(s_0(0) - b) & \tau < d \\
            s_0\bigl((\tau - d) / (1 - d)\bigr) & \text{else}
        \end{cases}

    Update 0 uses exactly ``start``, and the first update after the warm-up exactly :math:`s_0(0)`,
    as in transformers' ``get_*_schedule_with_warmup``. Within ``schedule`` a percentage refers to
    the budget after the warm-up, and other durations are counted from the end of the warm-up.

    Args:
        duration: Length :math:`d` of the warm-up.
        schedule: The schedule :math:`s_0` over the rest of the budget.
        shape: Curve :math:`w` of the rise: ``"linear"`` :math:`r`, ``"cosine"``
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
        check_non_negative("start", self.start)

    @cached_property
    def _length(self) -> float:
        return self._share("duration")

    def factor(self, fraction: float) -> float:
        """Evaluates the formula above; ``fraction`` in [0, 1]."""
        length = self._length
        risen = position(fraction, 0.0, length) if fraction < length else 1.0
        if risen == 1.0:
            return self.schedule.factor(position(fraction, length, 1.0 - length))
        rise = risen if self.shape == "linear" else COOLDOWNS[self.shape](1.0 - risen)
        return self.start + rise * (self.schedule.factor(0.0) - self.start)

    def resolve(self, horizon: Horizon) -> Schedule:
        """Resolves the warm-up, and the schedule on the part of the horizon after it.

        Raises:
            ValueError: If a duration cannot be converted, or the warm-up is longer than the
                budget.
        """
        (length,) = horizon.shares({"duration": self.duration})
        rest = part_horizon(horizon, length, 1.0 - length)
        return self._changed(
            duration=Duration(length, "fraction"), schedule=self.schedule.resolve(rest)
        )

    def boundaries(self) -> dict[str, float]:
        """Returns the end of the warm-up, and the boundaries of the schedule after it."""
        length = self._length
        later = {n: length + at * (1.0 - length) for n, at in self.schedule.boundaries().items()}
        return {"warmup ends": length, **later} if length else later

    def warmup_end(self) -> float:
        """Returns the end of the warm-up, including a warm-up at the start of the schedule."""
        length = self._length
        return length + self.schedule.warmup_end() * (1.0 - length)


@explain_arguments
@dataclass(frozen=True, kw_only=True)
class Product(Schedule):
    r"""Several schedules multiplied.

    .. math:: s(\tau) = \prod_i s_i(\tau)

    Args:
        schedules: The factors; each is a function of the whole budget.

    Raises:
        ValueError: If ``schedules`` is empty or not a list of schedules.

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
            raise ValueError(
                f"schedules must be a list of schedules, got {shown(schedules)}; for instance "
                "[Cosine(), MultiStep()]"
            )
        for index, schedule in enumerate(schedules):
            check_schedule(f"schedules[{index}]", schedule)
        self._set(schedules=tuple(schedules))

    def factor(self, fraction: float) -> float:
        """Evaluates the formula above; ``fraction`` in [0, 1]."""
        return math.prod([schedule.factor(fraction) for schedule in self.schedules])

    @property
    def is_constant(self) -> bool:
        """Whether all schedules are constant."""
        return all(schedule.is_constant for schedule in self.schedules)

    def resolve(self, horizon: Horizon) -> Schedule:
        """Resolves every schedule on the whole horizon.

        Raises:
            ValueError: If a duration cannot be converted, or does not fit.
        """
        return self._changed(schedules=tuple([s.resolve(horizon) for s in self.schedules]))

    def boundaries(self) -> dict[str, float]:
        """Returns the boundaries of every schedule."""
        return {
            f"schedule {number}: {name}": at
            for number, schedule in enumerate(self.schedules, start=1)
            for name, at in schedule.boundaries().items()
        }

    def warmup_end(self) -> float:
        """Returns the end of the longest warm-up among the schedules."""
        return max(schedule.warmup_end() for schedule in self.schedules)


@explain_arguments
@dataclass(frozen=True, kw_only=True)
class Clamp(Schedule):
    r"""A schedule limited to a range of factors.

    .. math:: s(\tau) = \min(\max(s_0(\tau), l), h)

    For bounds on the learning rate itself write
    ``LearningRateScheduler(schedule, min_lr=..., max_lr=...)``.

    Args:
        schedule: The schedule :math:`s_0`.
        low: Lower bound :math:`l`, dimensionless; None for no bound.
        high: Upper bound :math:`h`, dimensionless; None for no bound.
        unit: ``"factor"``, the only unit. Configurations saved by version 0.1 contain it.

    Raises:
        ValueError: If there is no bound, one is negative, ``low`` exceeds ``high``, or ``unit`` is
            ``"lr"`` as in version 0.1.

    Example:
        >>> from lightning_bigopt.schedules import Linear
        >>> Clamp(Linear(), low=0.1)(0.95)
        0.1
    """

    schedule: Schedule = field(kw_only=False)
    low: float | None = None
    high: float | None = None
    unit: str = "factor"  # not a Literal: a parser would reject "lr" without naming the new line

    def __post_init__(self) -> None:
        super().__post_init__()
        check_schedule("schedule", self.schedule)
        self._check_unit()
        if self.low is None and self.high is None:
            raise ValueError("low or high must be given, got None for both; for instance low=0.1")
        for name, bound in (("low", self.low), ("high", self.high)):
            if bound is not None:
                check_non_negative(name, bound)
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(
                f"low must be at most high, got low={self.low} and high={self.high}; lower low"
            )

    def _check_unit(self) -> None:
        bounds = {"min_lr": self.low, "max_lr": self.high}
        given = [f"{name}={shown(bound)}" for name, bound in bounds.items() if bound is not None]
        arguments = ", ".join(given or [f"{name}=..." for name in bounds])
        check_choice(
            "Clamp's unit",
            self.unit,
            ("factor",),
            hint=f"absolute bounds are LearningRateScheduler(schedule, {arguments})",
        )

    def factor(self, fraction: float) -> float:
        """Evaluates the formula above; ``fraction`` in [0, 1]."""
        factor = self.schedule.factor(fraction)
        if self.low is not None:
            factor = max(factor, self.low)
        if self.high is not None:
            factor = min(factor, self.high)
        return factor

    @property
    def is_constant(self) -> bool:
        """Whether the inner schedule is constant."""
        return self.schedule.is_constant

    def resolve(self, horizon: Horizon) -> Schedule:
        """Resolves the inner schedule.

        Raises:
            ValueError: If a duration cannot be converted, or does not fit.
        """
        return self._changed(schedule=self.schedule.resolve(horizon))

    def boundaries(self) -> dict[str, float]:
        """Returns the boundaries of the inner schedule."""
        return self.schedule.boundaries()

    def warmup_end(self) -> float:
        """Returns the end of the warm-up of the inner schedule."""
        return self.schedule.warmup_end()
