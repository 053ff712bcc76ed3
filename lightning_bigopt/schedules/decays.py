"""Schedules from one factor to another: constant, linear, cosine, polynomial and others."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import check_choice, check_non_negative, check_positive
from lightning_bigopt.schedules.base import Schedule
from lightning_bigopt.schedules.shapes import COOLDOWNS, CooldownShape

__all__ = ["REX", "Constant", "Cooldown", "Cosine", "Linear", "Polynomial"]


@explain_arguments
@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    r"""The same factor throughout.

    .. math:: s(\tau) = c

    Args:
        level: Factor :math:`c`, dimensionless.

    Raises:
        ValueError: If ``level`` is negative.

    Example:
        >>> Constant(0.5)(0.3)
        0.5

    References:
        transformers, ``get_constant_schedule``.
    """

    level: float = field(default=1.0, kw_only=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_non_negative("level", self.level)

    def factor(self, fraction: float) -> float:
        """Evaluates the formula above; ``fraction`` in [0, 1]."""
        return self.level

    @property
    def is_constant(self) -> bool:
        """True: the length of the run may be unknown."""
        return True


@explain_arguments
@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    r"""A straight line from ``start`` to ``end``, flat afterwards.

    .. math:: s(\tau) = b + (e - b)\,\tau

    Args:
        start: Factor :math:`b` at :math:`\tau = 0`, dimensionless.
        end: Factor :math:`e` from :math:`\tau = 1` on, dimensionless.

    Raises:
        ValueError: If ``start`` or ``end`` is negative.

    Example:
        >>> [Linear(end=0.2)(tau) for tau in (0.0, 0.5, 1.0, 2.0)]
        [1.0, 0.6, 0.2, 0.2]

    References:
        Bergsma et al., "Straight to Zero: Why Linearly Decaying the Learning Rate to Zero Works
        Best for LLMs", ICLR 2025.
    """

    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_non_negative("start", self.start)
        check_non_negative("end", self.end)

    def factor(self, fraction: float) -> float:
        """Evaluates the formula above; ``fraction`` in [0, 1]."""
        return self.start * (1.0 - fraction) + self.end * fraction  # exact at both ends


@explain_arguments
@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    r"""Half a cosine from ``start`` to ``end``, flat afterwards.

    .. math:: s(\tau) = e + \tfrac12 (b - e)(1 + \cos \pi \tau)

    Args:
        start: Factor :math:`b` at :math:`\tau = 0`, dimensionless.
        end: Factor :math:`e` from :math:`\tau = 1` on, dimensionless.

    Raises:
        ValueError: If ``start`` or ``end`` is negative.

    Example:
        >>> [round(Cosine(end=0.1)(tau), 3) for tau in (0.0, 0.5, 1.0, 2.0)]
        [1.0, 0.55, 0.1, 0.1]

    References:
        Loshchilov & Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017,
        Sec. 3, Eq. 5.
    """

    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_non_negative("start", self.start)
        check_non_negative("end", self.end)

    def factor(self, fraction: float) -> float:
        """Evaluates the formula above; ``fraction`` in [0, 1]."""
        return self.end + 0.5 * (self.start - self.end) * (1.0 + math.cos(math.pi * fraction))


@explain_arguments
@dataclass(frozen=True, kw_only=True)
class Polynomial(Schedule):
    r"""Polynomial decay: a power of the remaining fraction, from 1 to ``end``.

    .. math:: s(\tau) = e + (1 - e)(1 - \tau)^p

    Args:
        power: Exponent :math:`p`; 1 is a straight line.
        end: Factor :math:`e` from :math:`\tau = 1` on, dimensionless.

    Raises:
        ValueError: If ``power`` is not positive, or ``end`` is negative.

    Example:
        >>> [Polynomial(power=2)(tau) for tau in (0.0, 0.5, 1.0)]
        [1.0, 0.25, 0.0]

    References:
        Liu, Rabinovich & Berg, "ParseNet: Looking Wider to See Better", 2015, Sec. 3.3.
    """

    power: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("power", self.power)
        check_non_negative("end", self.end)

    def factor(self, fraction: float) -> float:
        """Evaluates the formula above; ``fraction`` in [0, 1]."""
        return self.end + (1.0 - self.end) * math.pow(1.0 - fraction, self.power)


@explain_arguments
@dataclass(frozen=True, kw_only=True)
class REX(Schedule):
    r"""Reflected exponential decay: slow at first, steep at the end.

    .. math:: s(\tau) = e + (1 - e)\,\frac{1 - \tau}{\tfrac12 + \tfrac12 (1 - \tau)}

    Args:
        end: Factor :math:`e` from :math:`\tau = 1` on, dimensionless.

    Raises:
        ValueError: If ``end`` is negative.

    Example:
        >>> [round(REX()(tau), 3) for tau in (0.0, 0.5, 0.9, 1.0)]
        [1.0, 0.667, 0.182, 0.0]

    References:
        Chen, Wolfe & Kyrillidis, "REX: Revisiting Budgeted Training with an Improved Schedule",
        MLSys 2022, Sec. 4.
    """

    end: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_non_negative("end", self.end)

    def factor(self, fraction: float) -> float:
        """Evaluates the formula above; ``fraction`` in [0, 1]."""
        remaining = 1.0 - fraction
        return self.end + (1.0 - self.end) * remaining / (0.5 + 0.5 * remaining)


@explain_arguments
@dataclass(frozen=True, kw_only=True)
class Cooldown(Schedule):
    r"""The cooldown of :class:`WarmupStableDecay` on its own, from ``start`` to ``end``.

    .. math::
        s(\tau) = e + c(\tau)(b - e), \qquad
        c(\tau) \in \{1 - \tau,\ \tfrac12 (1 + \cos \pi\tau),\ 1 - \sqrt\tau,\
            2 \cdot 0.5^\tau - 1\}

    Args:
        shape: Curve :math:`c`: ``"linear"``, ``"cosine"``, ``"1-sqrt"`` or ``"exponential"``.
        start: Factor :math:`b` at :math:`\tau = 0`, dimensionless.
        end: Factor :math:`e` from :math:`\tau = 1` on, dimensionless.

    Raises:
        ValueError: If ``shape`` is unknown, or ``start`` or ``end`` is negative.

    Example:
        >>> [Cooldown(shape="1-sqrt")(tau) for tau in (0.0, 0.25, 1.0)]
        [1.0, 0.5, 0.0]

    References:
        Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
        Durations", NeurIPS 2024, Sec. 3.
    """

    shape: CooldownShape = "1-sqrt"
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("shape", self.shape, CooldownShape)
        check_non_negative("start", self.start)
        check_non_negative("end", self.end)

    def factor(self, fraction: float) -> float:
        """Evaluates the formula above; ``fraction`` in [0, 1]."""
        return self.end + COOLDOWNS[self.shape](fraction) * (self.start - self.end)
