"""Decays with a period or timescale, which may be longer than the budget."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import check_between
from lightning_bigopt.durations.duration import Duration, DurationLike
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.schedules.base import Schedule
from lightning_bigopt.schedules.part_lengths import check_longer_than_zero
from lightning_bigopt.schedules.shapes import TOLERANCE

__all__ = ["Exponential", "InverseSquareRoot", "OnAxis", "Periodic", "Power", "StepDecay"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Periodic(Schedule):
    """Base class of schedules that depend on the number of periods passed.

    The fields named in ``_periods`` hold durations that need not fit into the budget. If the batch
    size changes during the run, periods in samples, tokens or epochs take different numbers of
    updates: the schedule is then evaluated on the axis of that unit (:class:`OnAxis`), so that it
    is the same curve over samples as with a constant batch size.

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
            check_longer_than_zero(name, length)

    def resolve(self, horizon: Horizon) -> Schedule:
        """Converts periods to fractions of the budget; uses their own axis if batch sizes change.

        Raises:
            ValueError: If a unit cannot be converted, or the batch grows and the periods are in
                different units.
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
            given = ", ".join(f"{name}={str(length)!r}" for name, length in lengths.items())
            raise ValueError(
                f"{' and '.join(lengths)} must be in the same unit if the batch grows, got "
                f"{given}; write them in one unit"
            )
        return OnAxis(schedule=resolved, axis=uneven[0])


@dataclass(frozen=True, kw_only=True)
class OnAxis(Schedule):
    """A resolved schedule on the axis of another unit than that of the budget.

    Args:
        schedule: The schedule, as a function of the fraction of the other unit's total.
        axis: Corners (fraction of the budget, amount of the other unit) from :meth:`Horizon.axis`.

    Example:
        >>> from lightning_bigopt.schedules import Linear
        >>> OnAxis(schedule=Linear(), axis=((0.0, 0.0), (0.5, 500.0), (1.0, 2000.0)))(0.5)
        0.75
    """

    schedule: Schedule
    axis: tuple[tuple[float, float], ...]

    @cached_property
    def _corners(self) -> tuple[list[float], list[float]]:
        """Fractions of the budget and of the other unit's total at the corners."""
        total = self.axis[-1][1]
        return [share for share, _ in self.axis], [amount / total for _, amount in self.axis]

    def factor(self, fraction: float) -> float:
        """Returns the schedule's factor at the fraction of the other unit's total."""
        return self.schedule.factor(self._interpolate(fraction, *self._corners))

    def boundaries(self) -> dict[str, float]:
        """Returns the boundaries of the schedule, as fractions of the budget."""
        shares, own = self._corners
        found = self.schedule.boundaries().items()
        return {name: self._interpolate(at, own, shares) for name, at in found}

    def warmup_end(self) -> float:
        """Returns the end of the schedule's warm-up, as a fraction of the budget."""
        shares, own = self._corners
        return self._interpolate(self.schedule.warmup_end(), own, shares)

    @staticmethod
    def _interpolate(at: float, source: list[float], target: list[float]) -> float:
        right = min(bisect_right(source, at), len(source) - 1)
        left = right - 1
        inside = (at - source[left]) / (source[right] - source[left])
        return target[left] * (1.0 - inside) + target[right] * inside


@explain_arguments
@dataclass(frozen=True, kw_only=True, repr=False)
class Exponential(Periodic):
    r"""Continuous exponential decay: by the factor ``decay`` in every period.

    .. math:: s(\tau) = \gamma^{\tau / p}

    Args:
        decay: Factor :math:`\gamma` in (0, 1].
        every: Period :math:`p`; by default the whole budget, which then ends at ``decay``.

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
        check_between("decay", self.decay, 0, 1, ends="(]")

    @cached_property
    def _period(self) -> float:
        return self._share("every")

    def factor(self, fraction: float) -> float:
        """Evaluates the formula above; ``fraction`` in [0, 1]."""
        return math.pow(self.decay, fraction / self._period)


@explain_arguments
@dataclass(frozen=True, kw_only=True, repr=False)
class StepDecay(Periodic):
    r"""Step decay: multiplied by ``decay`` at the end of every period.

    .. math:: s(\tau) = \gamma^{\lfloor \tau / p \rfloor}

    The update at which a period is complete uses the new factor. A period counts as complete from
    1e-9 periods before its end, so that rounding errors never delay a step.

    Args:
        decay: Factor :math:`\gamma` in (0, 1].
        every: Period :math:`p`.

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
        check_between("decay", self.decay, 0, 1, ends="(]")

    @cached_property
    def _period(self) -> float:
        return self._share("every")

    def factor(self, fraction: float) -> float:
        """Evaluates the formula above; ``fraction`` in [0, 1]."""
        return math.pow(self.decay, math.floor(fraction / self._period + TOLERANCE))


@explain_arguments
@dataclass(frozen=True, kw_only=True, repr=False)
class Power(Periodic):
    r"""A power law of the time since the beginning.

    .. math:: s(\tau) = (1 + \tau / p)^a

    After a warm-up of W updates and with a timescale of W updates this is :math:`(t / W)^a` in
    updates t of the whole run. The power scheduler ends with a linear tail; see the example.

    Args:
        exponent: Exponent :math:`a`, at most 0.
        timescale: Timescale :math:`p`.

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
        check_between("exponent", self.exponent, -math.inf, 0, ends="(]", hint="for instance -0.51")

    @cached_property
    def _period(self) -> float:
        return self._share("timescale")

    def factor(self, fraction: float) -> float:
        """Evaluates the formula above; ``fraction`` in [0, 1]."""
        return math.pow(1.0 + fraction / self._period, self.exponent)


@explain_arguments
@dataclass(frozen=True, kw_only=True, repr=False)
class InverseSquareRoot(Periodic):
    r"""One over the square root of the time since the beginning.

    .. math:: s(\tau) = \frac{1}{\sqrt{1 + \tau / p}}

    After a warm-up of W updates and with a timescale of W updates this is :math:`\sqrt{W / t}` in
    updates t of the whole run.

    Args:
        timescale: Timescale :math:`p`: after three of them the factor is one half.

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
        """Evaluates the formula above; ``fraction`` in [0, 1]."""
        return 1.0 / math.sqrt(1.0 + fraction / self._period)
