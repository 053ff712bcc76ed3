"""Shapes measured against a duration of their own, which may be longer than the budget."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from lightning_bigopt.durations import Duration, DurationLike, Horizon
from lightning_bigopt.schedules.base import Schedule
from lightning_bigopt.schedules.checks import (
    SNAP,
    check_non_negative,
)

__all__ = ["Exponential", "InverseSquareRoot", "OnAxis", "Periodic", "Power", "StepDecay"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Periodic(Schedule):
    """What depends on how many periods have passed.

    The fields in ``_periods`` hold durations that need not fit into the budget. Where updates grow
    during the run, periods in samples, tokens or epochs are not equally long in updates: the
    schedule is then laid out on the axis of its own unit (:class:`OnAxis`), so that it is the same
    curve against samples as without the growth.

    Example:
        >>> from lightning_bigopt.durations import Span
        >>> ramp = (Span(updates=50, samples=10), Span(updates=50, samples=30))
        >>> horizon = Horizon(clock="steps", budget=100, spans=ramp)
        >>> halved = StepDecay(decay=0.5, every="500 samples").resolve(horizon)
        >>> [halved(step / 100) for step in (0, 49, 50, 66, 67, 84)]
        [1.0, 1.0, 0.5, 0.5, 0.25, 0.125]
    """

    _periods: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        lengths = self._durations(*self._periods)
        self._set(**lengths)
        for name, length in lengths.items():
            if not length.value:
                raise ValueError(f"{name} must be longer than zero, got {str(length)!r}")

    def resolve(self, horizon: Horizon) -> Schedule:
        """The same curve with its periods as fractions, on their own axis where updates grow.

        Raises:
            ValueError: If a unit cannot be converted, or several periods are in different units
                and updates grow.
        """
        lengths = self._durations(*self._periods)
        axes = {d.unit: horizon.axis(d, name=n) for n, d in lengths.items()}
        shares = {
            n: Duration(d.value / axes[d.unit][-1][1], "fraction") for n, d in lengths.items()
        }
        resolved = self._changed(**shares)
        uneven = [axis for axis in axes.values() if len(axis) > 2]
        if not uneven:
            return resolved
        if len(axes) > 1:
            written = ", ".join(f"{name}={str(length)!r}" for name, length in lengths.items())
            raise ValueError(
                f"{' and '.join(lengths)} must be in the same unit where updates grow, got "
                f"{written}; write them in one unit"
            )
        return OnAxis(schedule=resolved, axis=uneven[0])


@dataclass(frozen=True, kw_only=True)
class OnAxis(Schedule):
    """A resolved schedule whose own time is another unit's than the budget's.

    Args:
        schedule: The schedule, as a function of the share of that unit's total.
        axis: Corners (share of the budget, amount of the unit), as :meth:`Horizon.axis` gives.

    Example:
        >>> from lightning_bigopt.schedules import Linear
        >>> OnAxis(schedule=Linear(), axis=((0.0, 0.0), (0.5, 500.0), (1.0, 2000.0)))(0.5)
        0.75
    """

    schedule: Schedule
    axis: tuple[tuple[float, float], ...]

    @cached_property
    def _corners(self) -> tuple[list[float], list[float]]:
        total = self.axis[-1][1]
        return [share for share, _ in self.axis], [amount / total for _, amount in self.axis]

    def factor(self, fraction: float) -> float:
        """The schedule's factor at the share of its own unit's total."""
        return self.schedule.factor(self._moved(fraction, *self._corners))

    def boundaries(self) -> dict[str, float]:
        """The schedule's seams, as fractions of the budget."""
        shares, own = self._corners
        seams = self.schedule.boundaries().items()
        return {name: self._moved(at, own, shares) for name, at in seams}

    @staticmethod
    def _moved(at: float, source: list[float], target: list[float]) -> float:
        right = min(bisect_right(source, at), len(source) - 1)
        left = right - 1
        inside = (at - source[left]) / (source[right] - source[left])
        return target[left] * (1.0 - inside) + target[right] * inside


@dataclass(frozen=True, kw_only=True, repr=False)
class Exponential(Periodic):
    r"""Exponential decay, continuous: by ``decay`` over every given duration.

    .. math:: s(\tau) = \gamma^{\tau / p}

    Args:
        decay: Factor :math:`\gamma` in (0, 1].
        every: Duration :math:`p`; by default the whole budget, which then ends at ``decay``.

    Raises:
        ValueError: If ``decay`` is not in (0, 1], or ``every`` is zero.

    Example:
        >>> [round(Exponential(decay=0.01)(tau), 3) for tau in (0.0, 0.5, 1.0)]
        [1.0, 0.1, 0.01]

    References:
        torch, ``ExponentialLR`` with ``every="1 epoch"``.
    """

    _periods: ClassVar[tuple[str, ...]] = ("every",)

    decay: float = 0.1
    every: DurationLike = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decay("decay", self.decay)

    @cached_property
    def _period(self) -> float:
        return self._share("every")

    def factor(self, fraction: float) -> float:
        """Follows the formula above; ``fraction`` in [0, 1]."""
        return math.pow(self.decay, fraction / self._period)


@dataclass(frozen=True, kw_only=True, repr=False)
class StepDecay(Periodic):
    r"""A staircase: multiplied by ``decay`` once every given duration.

    .. math:: s(\tau) = \gamma^{\lfloor \tau / p \rfloor}

    The update at which a period is complete sees the new factor. Positions within 1e-9 of a period
    count as complete, so that rounding never delays a stair.

    Args:
        decay: Factor :math:`\gamma` in (0, 1].
        every: Duration :math:`p` of a stair.

    Raises:
        ValueError: If ``decay`` is not in (0, 1], or ``every`` is zero.

    Example:
        >>> StepDecay(decay=0.5, every="2 steps").values(6)
        [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]

    References:
        torch, ``StepLR``.
    """

    _periods: ClassVar[tuple[str, ...]] = ("every",)

    decay: float = 0.1
    every: DurationLike = "30%"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decay("decay", self.decay)

    @cached_property
    def _period(self) -> float:
        return self._share("every")

    def factor(self, fraction: float) -> float:
        """Follows the formula above; ``fraction`` in [0, 1]."""
        return math.pow(self.decay, math.floor(fraction / self._period + SNAP))


@dataclass(frozen=True, kw_only=True, repr=False)
class Power(Periodic):
    r"""A power law of the time since its beginning.

    .. math:: s(\tau) = (1 + \tau / p)^a

    After a warm-up of the same length as the timescale this is :math:`(t / W)^a` in updates t of
    the whole run. The power scheduler ends with a linear tail; see the example.

    Args:
        exponent: Exponent :math:`a`, at most 0.
        timescale: Duration :math:`p`.

    Raises:
        ValueError: If ``exponent`` is positive, or ``timescale`` is zero.

    Example:
        >>> round(Power(-0.51, timescale="1%")(1.0), 3)
        0.095
        >>> from lightning_bigopt.schedules import Chain, Linear, Warmup
        >>> law = Warmup("100 steps", Power(-0.51, timescale="100 steps"))
        >>> schedule = Chain([("90%", law), Linear()], seams="scale")

    References:
        Shen et al., "Power Scheduler: A Batch Size and Token Number Agnostic Learning Rate
        Scheduler", 2024 (arXiv:2408.13359), Sec. 3.
    """

    _periods: ClassVar[tuple[str, ...]] = ("timescale",)

    exponent: float = field(default=-0.51, kw_only=False)
    timescale: DurationLike = "2%"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.exponent) and self.exponent <= 0):
            raise ValueError(
                f"exponent must be at most 0, because a schedule never rises for ever, got "
                f"{self.exponent!r}"
            )

    @cached_property
    def _period(self) -> float:
        return self._share("timescale")

    def factor(self, fraction: float) -> float:
        """Follows the formula above; ``fraction`` in [0, 1]."""
        return math.pow(1.0 + fraction / self._period, self.exponent)


@dataclass(frozen=True, kw_only=True, repr=False)
class InverseSquareRoot(Periodic):
    r"""One over the square root of the time since its beginning.

    .. math:: s(\tau) = \frac{1}{\sqrt{1 + \tau / p}}

    After a warm-up of the same length as the timescale this is :math:`\sqrt{W / t}` in updates t
    of the whole run.

    Args:
        timescale: Duration :math:`p`: after three of them the factor is one half.

    Raises:
        ValueError: If ``timescale`` is zero.

    Example:
        >>> InverseSquareRoot(timescale="25%")(0.75)
        0.5

    References:
        Zhai et al., "Scaling Vision Transformers", CVPR 2022, Sec. 3.5; transformers,
        ``get_inverse_sqrt_schedule``.
    """

    _periods: ClassVar[tuple[str, ...]] = ("timescale",)

    timescale: DurationLike = "2%"

    @cached_property
    def _period(self) -> float:
        return self._share("timescale")

    def factor(self, fraction: float) -> float:
        """Follows the formula above; ``fraction`` in [0, 1]."""
        return 1.0 / math.sqrt(1.0 + fraction / self._period)


def check_decay(name: str, value: float) -> None:
    """Refuses what would not decay, or would fall to zero at once."""
    check_non_negative(**{name: value})
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value!r}")
