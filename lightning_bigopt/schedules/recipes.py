"""Common schedules with a warm-up; all percentages refer to the whole budget."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import check_between, check_choice, check_non_negative
from lightning_bigopt.durations.duration import Duration, DurationLike
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.schedules.base import Schedule
from lightning_bigopt.schedules.composition import Warmup
from lightning_bigopt.schedules.decays import Constant, Cosine, Linear
from lightning_bigopt.schedules.part_lengths import check_longer_than_zero
from lightning_bigopt.schedules.periodic import InverseSquareRoot
from lightning_bigopt.schedules.shapes import WarmupShape

__all__ = [
    "Noam",
    "Recipe",
    "WarmupConstant",
    "WarmupCosine",
    "WarmupInverseSquareRoot",
    "WarmupLinear",
]


@dataclass(frozen=True, kw_only=True, repr=False)
class Recipe(Schedule):
    """Base class of schedules that begin with a warm-up.

    Args:
        warmup: Length of the warm-up.
        warmup_shape: Curve of the rise: see :class:`Warmup`.
        start: Factor at update 0, dimensionless.

    Raises:
        ValueError: If a duration is longer than the budget, or a factor is negative.

    Example:
        >>> WarmupLinear(warmup="10%").expand()
        Warmup(duration='10%', schedule=Linear(start=1.0, end=0.0), shape='linear', start=0.0)
    """

    _parts: ClassVar[tuple[str, ...]] = ("warmup",)

    warmup: DurationLike = "2%"
    warmup_shape: WarmupShape = "linear"
    start: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("warmup_shape", self.warmup_shape, WarmupShape)
        check_non_negative("start", self.start)

    @abstractmethod
    def expand(self) -> Schedule:
        """Returns the same curve made of basic schedules; durations must be resolved."""

    @cached_property
    def _curve(self) -> Schedule:
        return self.expand()

    def _warmed_up(self, schedule: Schedule) -> Schedule:
        length = self._share("warmup")
        return Warmup(length, schedule, shape=self.warmup_shape, start=self.start)

    def factor(self, fraction: float) -> float:
        """Returns the factor of the expanded curve; ``fraction`` in [0, 1]."""
        return self._curve.factor(fraction)

    def boundaries(self) -> dict[str, float]:
        """Returns the boundaries of the expanded curve."""
        return self._curve.boundaries()

    def warmup_end(self) -> float:
        """Returns the end of the warm-up."""
        return self._curve.warmup_end()


@explain_arguments
@dataclass(frozen=True, kw_only=True, repr=False)
class WarmupConstant(Recipe):
    r"""A warm-up, then the peak.

    .. math:: s(\tau) = \min(1,\ \tau / w)

    Args:
        warmup: Length :math:`w` of the warm-up.
        warmup_shape: Curve of the rise: ``"linear"``, ``"cosine"`` or ``"1-sqrt"``.
        start: Factor at update 0, dimensionless.

    Raises:
        ValueError: If the warm-up is longer than the budget, or ``start`` is negative.

    Example:
        >>> WarmupConstant(warmup=2).values(4)
        [0.0, 0.5, 1.0, 1.0]

    References:
        transformers, ``get_constant_schedule_with_warmup``.
    """

    def expand(self) -> Schedule:
        """Returns the same curve made of basic schedules; durations must be resolved."""
        return self._warmed_up(Constant())


@explain_arguments
@dataclass(frozen=True, kw_only=True, repr=False)
class WarmupLinear(Recipe):
    r"""A warm-up, then a straight line to ``end``; to zero by default ("D2Z").

    .. math:: s(\tau) = e + (1 - e)\,\frac{1 - \tau}{1 - w} \quad (\tau \ge w)

    Args:
        warmup: Length :math:`w` of the warm-up.
        warmup_shape: Curve of the rise: ``"linear"``, ``"cosine"`` or ``"1-sqrt"``.
        start: Factor at update 0, dimensionless.
        end: Factor :math:`e` at the end of the budget, from 0 to 1.

    Raises:
        ValueError: If the warm-up is longer than the budget, or a factor is out of range.

    Example:
        >>> WarmupLinear(warmup=4).values(8)
        [0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]

    References:
        Bergsma et al., "Straight to Zero: Why Linearly Decaying the Learning Rate to Zero Works
        Best for LLMs", ICLR 2025 (arXiv:2502.15938).
    """

    end: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between("end", self.end, 0, 1, ends="[]", hint="the peak is 1")

    def expand(self) -> Schedule:
        """Returns the same curve made of basic schedules; durations must be resolved."""
        return self._warmed_up(Linear(end=self.end))


@explain_arguments
@dataclass(frozen=True, kw_only=True, repr=False)
class WarmupCosine(Recipe):
    r"""A warm-up, then half a cosine to ``end``.

    .. math::
        s(\tau) = e + \tfrac12 (1 - e)
            \left(1 + \cos \pi \frac{\tau - w}{1 - w}\right) \quad (\tau \ge w)

    Args:
        warmup: Length :math:`w` of the warm-up.
        warmup_shape: Curve of the rise: ``"linear"``, ``"cosine"`` or ``"1-sqrt"``.
        start: Factor at update 0, dimensionless.
        end: Factor :math:`e` at the end of the budget, from 0 to 1.

    Raises:
        ValueError: If the warm-up is longer than the budget, or a factor is out of range.

    Example:
        >>> [round(factor, 3) for factor in WarmupCosine(warmup=2, end=0.0).values(6)]
        [0.0, 0.5, 1.0, 0.854, 0.5, 0.146]

    References:
        Loshchilov & Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017,
        Sec. 3; the floor of 0.1 as in Hoffmann et al., "Training Compute-Optimal Large Language
        Models", 2022, App. B.
    """

    end: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between("end", self.end, 0, 1, ends="[]", hint="the peak is 1")

    def expand(self) -> Schedule:
        """Returns the same curve made of basic schedules; durations must be resolved."""
        return self._warmed_up(Cosine(end=self.end))


@explain_arguments
@dataclass(frozen=True, kw_only=True, repr=False)
class WarmupInverseSquareRoot(Recipe):
    r"""A warm-up, then one over the square root of the time since its end.

    .. math:: s(\tau) = \frac{1}{\sqrt{1 + (\tau - w) / p}} \quad (\tau \ge w)

    Args:
        warmup: Length :math:`w` of the warm-up.
        warmup_shape: Curve of the rise: ``"linear"``, ``"cosine"`` or ``"1-sqrt"``.
        start: Factor at update 0, dimensionless.
        timescale: Timescale :math:`p`; None for the length of the warm-up, which makes the curve
            :math:`\sqrt{w / \tau}`.

    Raises:
        ValueError: If the warm-up is longer than the budget, or the timescale is zero.

    Example:
        >>> WarmupInverseSquareRoot(warmup="25%")(1.0)
        0.5

    References:
        Zhai et al., "Scaling Vision Transformers", CVPR 2022, Sec. 3.5; transformers,
        ``get_inverse_sqrt_schedule``.
    """

    timescale: DurationLike | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        lengths = self._durations("warmup", "timescale")
        self._set(**lengths)
        if not list(lengths.values())[-1].value:
            raise ValueError(
                f"timescale must be longer than zero, got {str(list(lengths.values())[-1])!r} with "
                f"warmup={str(self.warmup)!r}; pass timescale=, or a warm-up longer than zero"
            )

    def expand(self) -> Schedule:
        """Returns the same curve made of basic schedules; durations must be resolved."""
        timescale = self._share("warmup" if self.timescale is None else "timescale")
        rest = 1.0 - self._share("warmup")
        # The budget of the inner schedule is the rest after the warm-up.
        own = Duration(timescale / rest if rest > 0 else 1.0, "fraction")
        return self._warmed_up(InverseSquareRoot(timescale=own))

    def resolve(self, horizon: Horizon) -> Schedule:
        """Converts the durations; uses the axis of the timescale's unit if batch sizes change.

        Raises:
            ValueError: If a duration cannot be converted, or the warm-up is longer than the
                budget.
        """
        timescale = self.warmup if self.timescale is None else self.timescale
        if Duration.parse(timescale).unit == "fraction":
            return super().resolve(horizon)
        horizon.shares(self._durations("warmup"))  # an error names this argument
        after = InverseSquareRoot(timescale=timescale)
        composed = Warmup(self.warmup, after, shape=self.warmup_shape, start=self.start)
        return composed.resolve(horizon)


@explain_arguments
@dataclass(frozen=True, kw_only=True, repr=False)
class Noam(Schedule):
    r"""The schedule of the Transformer paper, scaled so that its peak is 1.

    .. math:: s(\tau) = \min\left(\frac{\tau}{w},\ \sqrt{\frac{w}{\tau}}\right)

    The paper's learning rate is :math:`d_{model}^{-0.5} W^{-0.5}` times this factor, with W warm-up
    updates. The paper counts updates from 1, this class from 0.

    Args:
        warmup: Length :math:`w` of the warm-up.

    Raises:
        ValueError: If the warm-up is zero or longer than the budget.

    Example:
        >>> [Noam(warmup="25%")(tau) for tau in (0.0, 0.125, 0.25, 1.0)]
        [0.0, 0.5, 1.0, 0.5]

    References:
        Vaswani et al., "Attention Is All You Need", NeurIPS 2017, Sec. 5.3, Eq. 3.
    """

    _parts: ClassVar[tuple[str, ...]] = ("warmup",)

    warmup: DurationLike = "2%"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_longer_than_zero("warmup", self.warmup)

    @cached_property
    def _length(self) -> float:
        return self._share("warmup")

    def factor(self, fraction: float) -> float:
        """Evaluates the formula above; ``fraction`` in [0, 1]."""
        length = self._length
        return fraction / length if fraction < length else math.sqrt(length / fraction)

    def boundaries(self) -> dict[str, float]:
        """Returns the end of the warm-up."""
        return {"warmup ends": self._length}
