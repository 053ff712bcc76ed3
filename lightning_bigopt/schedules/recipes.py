"""Whole schedules under the field's names: every duration is a share of the whole budget."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from lightning_bigopt.durations import DurationLike
from lightning_bigopt.schedules.base import (
    CooldownShape,
    Schedule,
    check_choice,
    check_end,
    check_non_negative,
)
from lightning_bigopt.schedules.composition import Warmup, WarmupShape
from lightning_bigopt.schedules.decays import Constant, Cosine, Linear

__all__ = ["Recipe", "WarmupConstant", "WarmupCosine", "WarmupLinear", "WarmupStableDecay"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Recipe(Schedule):
    """A warm-up and what follows, under one name.

    Args:
        warmup: Length of the warm-up.
        warmup_shape: How it rises: see :class:`Warmup`.
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
        check_non_negative(start=self.start)

    @abstractmethod
    def expand(self) -> Schedule:
        """The same curve, written in shapes and compositions; durations must be resolved."""

    @cached_property
    def _curve(self) -> Schedule:
        return self.expand()

    def _warmed_up(self, schedule: Schedule) -> Schedule:
        length = self._share("warmup")
        return Warmup(length, schedule, shape=self.warmup_shape, start=self.start)

    def factor(self, fraction: float) -> float:
        return self._curve.factor(fraction)

    def boundaries(self) -> dict[str, float]:
        return self._curve.boundaries()


@dataclass(frozen=True, kw_only=True, repr=False)
class WarmupConstant(Recipe):
    r"""A warm-up, then the peak for ever.

    .. math:: s(\tau) = \min(1,\ \tau / w)

    Args:
        warmup: Length :math:`w` of the warm-up.
        warmup_shape: How it rises: ``"linear"``, ``"cosine"`` or ``"1-sqrt"``.
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
        return self._warmed_up(Constant())


@dataclass(frozen=True, kw_only=True, repr=False)
class WarmupLinear(Recipe):
    r"""A warm-up, then a straight line to ``end``; to zero by default ("D2Z").

    .. math:: s(\tau) = e + (1 - e)\,\frac{1 - \tau}{1 - w} \quad (\tau \ge w)

    Args:
        warmup: Length :math:`w` of the warm-up.
        warmup_shape: How it rises: ``"linear"``, ``"cosine"`` or ``"1-sqrt"``.
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
        check_end(self.end)

    def expand(self) -> Schedule:
        return self._warmed_up(Linear(end=self.end))


@dataclass(frozen=True, kw_only=True, repr=False)
class WarmupCosine(Recipe):
    r"""A warm-up, then half a cosine to ``end``.

    .. math::
        s(\tau) = e + \tfrac12 (1 - e)
            \left(1 + \cos \pi \frac{\tau - w}{1 - w}\right) \quad (\tau \ge w)

    Args:
        warmup: Length :math:`w` of the warm-up.
        warmup_shape: How it rises: ``"linear"``, ``"cosine"`` or ``"1-sqrt"``.
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
        check_end(self.end)

    def expand(self) -> Schedule:
        return self._warmed_up(Cosine(end=self.end))


@dataclass(frozen=True, kw_only=True, repr=False)
class WarmupStableDecay(Recipe):
    r"""A warm-up, the peak, and a cooldown that ends with the budget (WSD, trapezoidal).

    .. math::
        s(\tau) = \begin{cases}
            \tau / w & \tau < w \\
            1 & w \le \tau < 1 - d \\
            e + c\bigl((\tau - 1 + d) / d\bigr)(1 - e) & \text{else}
        \end{cases}

    where :math:`c(r)` is :math:`1 - r` (``"linear"``), :math:`\tfrac12 (1 + \cos \pi r)`
    (``"cosine"``), :math:`1 - \sqrt r` (``"1-sqrt"``) or :math:`2 \cdot 0.5^r - 1`
    (``"exponential"``).

    Args:
        warmup: Length :math:`w` of the warm-up.
        warmup_shape: How it rises: ``"linear"``, ``"cosine"`` or ``"1-sqrt"``.
        start: Factor at update 0, dimensionless.
        decay: Length :math:`d` of the cooldown.
        cooldown: The curve :math:`c` of the cooldown.
        end: Factor :math:`e` at the end of the budget, from 0 to 1.

    Raises:
        ValueError: If warm-up and cooldown are longer than the budget together, a shape is
            unknown, or a factor is out of range.

    Example:
        >>> WarmupStableDecay(warmup=2, decay=4).values(10)
        [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, ...]

    References:
        Hu et al., "MiniCPM", 2024, Sec. 4; Hägele et al., "Scaling Laws and Compute-Optimal
        Training Beyond Fixed Training Durations", NeurIPS 2024, Sec. 3.
    """

    _last: ClassVar[tuple[str, ...]] = ("decay",)

    decay: DurationLike = "20%"
    cooldown: CooldownShape = "1-sqrt"
    end: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("cooldown", self.cooldown, CooldownShape)
        check_end(self.end)

    def expand(self) -> Schedule:
        stable, decay = self._warmed_up(Constant()), self._share("decay")
        if not decay:
            return stable
        return stable.with_cooldown(1.0 - decay, over=decay, shape=self.cooldown, end=self.end)
