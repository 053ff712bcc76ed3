"""Schedules with a warm-up, a plateau for most of the run, and a decay or cooldown."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import check_between, check_choice, check_non_negative
from lightning_bigopt.durations.duration import DurationLike
from lightning_bigopt.schedules.base import Schedule
from lightning_bigopt.schedules.chain import Chain
from lightning_bigopt.schedules.decays import Constant, Cosine
from lightning_bigopt.schedules.recipes import Recipe
from lightning_bigopt.schedules.shapes import CooldownShape, WarmupShape, position

__all__ = ["InfiniteSchedule", "TriStage", "WarmupStableDecay"]


@explain_arguments
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
        warmup_shape: Curve of the rise: ``"linear"``, ``"cosine"`` or ``"1-sqrt"``.
        start: Factor at update 0, dimensionless.
        decay: Length :math:`d` of the cooldown.
        cooldown: Curve :math:`c` of the cooldown.
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

    warmup_shape: WarmupShape = "linear"  # repeated: type hints are resolved in this module
    decay: DurationLike = "20%"
    cooldown: CooldownShape = "1-sqrt"
    end: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("cooldown", self.cooldown, CooldownShape)
        check_between("end", self.end, 0, 1, ends="[]", hint="the peak is 1")

    def expand(self) -> Schedule:
        """Returns the same curve made of basic schedules; durations must be resolved."""
        stable, decay = self._warmed_up(Constant()), self._share("decay")
        if not decay:
            return stable
        return stable.with_cooldown(1.0 - decay, over=decay, shape=self.cooldown, end=self.end)


@explain_arguments
@dataclass(frozen=True, kw_only=True, repr=False)
class InfiniteSchedule(Recipe):
    r"""A warm-up, half a cosine to a plateau, the plateau, and optionally a cooldown.

    .. math::
        s(\tau) = \begin{cases}
            \tau / w & \tau < w \\
            p + \tfrac12 (1 - p)\bigl(1 + \cos \pi \tfrac{\tau - w}{d}\bigr)
                & w \le \tau < w + d \\
            p & \text{else}
        \end{cases}

    Without ``cooldown`` the run can be extended at any time; :meth:`Schedule.with_cooldown` makes
    the schedule of a branch that ends with a finished model. With ``cooldown`` the factor falls
    from the plateau to ``end`` at the end of the budget, as in :class:`WarmupStableDecay`.

    Args:
        warmup: Length :math:`w` of the warm-up.
        warmup_shape: Curve of the rise: ``"linear"``, ``"cosine"`` or ``"1-sqrt"``.
        start: Factor at update 0, dimensionless.
        decay: Length :math:`d` of the fall to the plateau.
        plateau: Factor :math:`p` of the plateau, from 0 to 1.
        cooldown: Length of a cooldown that ends with the budget; None for no cooldown.
        cooldown_shape: Curve of the cooldown: see :class:`WarmupStableDecay`.
        end: Factor at the end of the cooldown, from 0 to 1.

    Raises:
        ValueError: If the parts are longer than the budget together, a shape is unknown, or a
            factor is out of range.

    Example:
        >>> schedule = InfiniteSchedule(warmup="10%", decay="20%", plateau=0.5)
        >>> [round(schedule(tau), 3) for tau in (0.05, 0.1, 0.2, 0.3, 1.0)]
        [0.5, 1.0, 0.75, 0.5, 0.5]

    References:
        Ibrahim et al., "Simple and Scalable Strategies to Continually Pre-train Large Language
        Models", 2024 (arXiv:2403.08763), Sec. 7.4; Singh et al., "Beyond Cosine Decay: On the
        Effectiveness of Infinite Learning Rate Schedule for Continual Pre-training", 2025
        (arXiv:2503.02844).
    """

    _parts: ClassVar[tuple[str, ...]] = ("warmup", "decay")
    _last: ClassVar[tuple[str, ...]] = ("cooldown",)

    warmup_shape: WarmupShape = "linear"  # repeated: type hints are resolved in this module
    decay: DurationLike = "20%"
    plateau: float = 0.5
    cooldown: DurationLike | None = None
    cooldown_shape: CooldownShape = "1-sqrt"
    end: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("cooldown_shape", self.cooldown_shape, CooldownShape)
        check_between("end", self.end, 0, 1, ends="[]", hint="the peak is 1")
        check_between("plateau", self.plateau, 0, 1, ends="[]", hint="the peak is 1")

    def expand(self) -> Schedule:
        """Returns the same curve made of basic schedules; durations must be resolved."""
        rest = 1.0 - self._share("warmup")
        decay = min(self._share("decay") / rest, 1.0) if rest > 0 else 0.0
        fall = Cosine(end=self.plateau)
        after = Chain(((decay, fall), Constant(self.plateau))) if decay else Constant(self.plateau)
        endless = self._warmed_up(after)
        length = 0.0 if self.cooldown is None else self._share("cooldown")
        if not length:
            return endless
        return endless.with_cooldown(
            1.0 - length, over=length, shape=self.cooldown_shape, end=self.end
        )

    def boundaries(self) -> dict[str, float]:
        """Returns the end of the warm-up and the starts of the plateau and of the cooldown."""
        warmup = self._share("warmup")
        found = {"warmup ends": warmup} if warmup else {}
        found["plateau starts"] = warmup + self._share("decay")
        length = 0.0 if self.cooldown is None else self._share("cooldown")
        return {**found, "cooldown starts": 1.0 - length} if length else found


@explain_arguments
@dataclass(frozen=True, kw_only=True, repr=False)
class TriStage(Schedule):
    r"""A linear rise, the peak, an exponential fall, then flat at ``end``.

    .. math::
        s(\tau) = \begin{cases}
            b + (1 - b)\,\tau / w & \tau < w \\
            1 & w \le \tau < w + h \\
            e^{(\tau - w - h) / d} & w + h \le \tau < w + h + d
        \end{cases}

    Args:
        warmup: Length :math:`w` of the rise.
        hold: Length :math:`h` of the peak.
        decay: Length :math:`d` of the fall.
        start: Factor :math:`b` at update 0, dimensionless.
        end: Factor :math:`e` at the end of the fall, in (0, 1].

    Raises:
        ValueError: If the parts are longer than the budget together, or a factor is out of range.

    Example:
        >>> [round(TriStage()(tau), 3) for tau in (0.0, 0.05, 0.1, 0.5, 0.75, 1.0)]
        [0.01, 0.505, 1.0, 1.0, 0.1, 0.01]

    References:
        Park et al., "SpecAugment: A Simple Data Augmentation Method for Automatic Speech
        Recognition", Interspeech 2019, Sec. 3.2; fairseq, ``tri_stage``.
    """

    _parts: ClassVar[tuple[str, ...]] = ("warmup", "hold", "decay")

    warmup: DurationLike = "10%"
    hold: DurationLike = "40%"
    decay: DurationLike = "50%"
    start: float = 0.01
    end: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_non_negative("start", self.start)
        check_between("end", self.end, 0, 1, ends="(]", hint="an exponential never reaches 0")

    @cached_property
    def _lengths(self) -> tuple[float, float, float]:
        """End of the rise, start of the fall, and length of the fall."""
        warmup, hold = self._share("warmup"), self._share("hold")
        return warmup, warmup + hold, self._share("decay")

    def factor(self, fraction: float) -> float:
        """Evaluates the formula above; ``fraction`` in [0, 1]."""
        warmup, fall, decay = self._lengths
        if fraction < warmup:
            return self.start + (1.0 - self.start) * position(fraction, 0.0, warmup)
        if fraction < fall:
            return 1.0
        return math.pow(self.end, position(fraction, fall, decay))

    def boundaries(self) -> dict[str, float]:
        """Returns the end of the rise, and the start and the end of the fall."""
        warmup, fall, decay = self._lengths
        return {"warmup ends": warmup, "decay starts": fall, "decay ends": fall + decay}
