"""Schedules that rise and fall: one cycle, triangular cycles, cosines with restarts."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, TypeAlias

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import check_between, check_choice, check_non_negative
from lightning_bigopt.durations.duration import DurationLike
from lightning_bigopt.schedules.base import Schedule
from lightning_bigopt.schedules.periodic import Periodic
from lightning_bigopt.schedules.shapes import COOLDOWNS, TOLERANCE, position

__all__ = ["CosineWithRestarts", "Cyclic", "OneCycle"]

CyclicMode: TypeAlias = Literal["triangular", "triangular2", "exp_range"]


_MOST_BOUNDARIES = 10_000


@explain_arguments
@dataclass(frozen=True, kw_only=True, repr=False)
class OneCycle(Schedule):
    r"""One rise to the peak, then one long fall to far below the start.

    .. math::
        s(\tau) = \begin{cases}
            1 + c(\tau / w)(b - 1) & \tau < w \\
            e + c\bigl((\tau - w) / (1 - w)\bigr)(1 - e) & \text{else}
        \end{cases}

    with :math:`c(r) = \tfrac12 (1 + \cos \pi r)` (``"cosine"``) or :math:`1 - r` (``"linear"``).
    In a run of T updates the peak is at update :math:`w T` and the end at :math:`T`. torch's
    ``OneCycleLR`` reaches both one update earlier, at ``pct_start * total_steps - 1`` and
    ``total_steps - 1``.

    Args:
        warmup: Length :math:`w` of the rise.
        start: Factor :math:`b` at update 0 (torch: ``1 / div_factor``).
        end: Factor :math:`e` at the end (torch: ``1 / (div_factor * final_div_factor)``).
        shape: ``"cosine"`` or ``"linear"``.

    Raises:
        ValueError: If the rise is longer than the budget, ``shape`` is unknown, or a factor is
            negative.

    Example:
        >>> [round(OneCycle(shape="linear")(tau), 3) for tau in (0.0, 0.15, 0.3, 0.65, 1.0)]
        [0.04, 0.52, 1.0, 0.5, 0.0]

    References:
        Smith & Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large
        Learning Rates", 2018, Sec. 3.
    """

    _parts: ClassVar[tuple[str, ...]] = ("warmup",)

    warmup: DurationLike = "30%"
    start: float = 0.04
    end: float = 4e-6
    shape: Literal["cosine", "linear"] = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_non_negative("start", self.start)
        check_non_negative("end", self.end)
        check_choice("shape", self.shape, Literal["cosine", "linear"])

    @cached_property
    def _length(self) -> float:
        return self._share("warmup")

    def factor(self, fraction: float) -> float:
        """Evaluates the formula above; ``fraction`` in [0, 1]."""
        length, fall = self._length, COOLDOWNS[self.shape]
        if fraction < length:
            return 1.0 + fall(position(fraction, 0.0, length)) * (self.start - 1.0)
        return self.end + fall(position(fraction, length, 1.0 - length)) * (1.0 - self.end)

    def boundaries(self) -> dict[str, float]:
        """Returns the position of the peak."""
        return {"peak": self._length}

    def warmup_end(self) -> float:
        """Returns the end of the rise."""
        return self._length


@explain_arguments
@dataclass(frozen=True, kw_only=True, repr=False)
class Cyclic(Periodic):
    r"""A triangle wave between ``low`` and the peak.

    .. math:: s(\tau) = l + (1 - l)\,a(\tau)\,\mathrm{tri}(\tau)

    where :math:`\mathrm{tri}` rises from 0 to 1 during ``up`` and falls back during ``down``, and
    with q cycles passed the amplitude :math:`a` is 1 (``"triangular"``),
    :math:`\gamma^{\lfloor q \rfloor}` (``"triangular2"``) or :math:`\gamma^q` (``"exp_range"``).

    Args:
        low: Factor :math:`l` at the bottom, from 0 to 1 (torch: ``base_lr / max_lr``).
        up: Length of a rise (torch: ``step_size_up``).
        down: Length of a fall; None for the length of the rise.
        mode: Change of the amplitude over the cycles; see above.
        cycle_decay: Factor :math:`\gamma` of the amplitude over a whole cycle, in (0, 1]; one half
            is Smith's ``triangular2``. (torch's ``gamma`` is per update.)

    Raises:
        ValueError: If a length is zero, ``mode`` is unknown, or a factor is out of range.

    Example:
        >>> wave = Cyclic(low=0.0, up=2, mode="triangular2")
        >>> wave.values(8)
        [0.0, 0.5, 1.0, 0.5, 0.0, 0.25, 0.5, 0.25]

    References:
        Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017, Sec. 3.
    """

    _periods: ClassVar[tuple[str, ...]] = ("up", "down")

    low: float = 0.25
    up: DurationLike = "10%"
    down: DurationLike | None = None
    mode: CyclicMode = "triangular"
    cycle_decay: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between("low", self.low, 0, 1, ends="[]", hint="the peak is 1")
        check_choice("mode", self.mode, CyclicMode)
        check_between("cycle_decay", self.cycle_decay, 0, 1, ends="(]")

    @cached_property
    def _cycle(self) -> tuple[float, float]:
        """Length of a cycle, and the fraction of the cycle that the rise takes."""
        up = self._share("up")
        length = up + (up if self.down is None else self._share("down"))
        return length, up / length

    def factor(self, fraction: float) -> float:
        """Evaluates the formula above; ``fraction`` in [0, 1]."""
        length, rise = self._cycle
        passed = fraction / length
        cycle = math.floor(passed)
        inside = passed - cycle
        height = inside / rise if inside <= rise else (1.0 - inside) / (1.0 - rise)
        if self.mode != "triangular":
            height *= math.pow(self.cycle_decay, cycle if self.mode == "triangular2" else passed)
        return self.low + (1.0 - self.low) * height


@explain_arguments
@dataclass(frozen=True, kw_only=True, repr=False)
class CosineWithRestarts(Periodic):
    r"""Half cosines one after another, each from its peak to ``end``.

    .. math::
        s(\tau) = e + \tfrac12 (d^i - e)(1 + \cos \pi r), \qquad
        p_i = p_0 m^i

    in cycle i, where r goes from 0 to 1 over its length :math:`p_i`. The update at which a cycle is
    complete uses the next peak; there is no restart at the end of the budget.

    Args:
        first_cycle: Length :math:`p_0` of the first cycle (torch: ``T_0``; transformers:
            ``1 / num_cycles``; timm: ``t_initial``).
        cycle_multiplier: Ratio :math:`m` of each length to the previous one, at least 1 (torch:
            ``T_mult``; timm: ``cycle_mul``).
        cycle_decay: Ratio :math:`d` of each peak to the previous one, in (0, 1] (timm:
            ``cycle_decay``).
        end: Factor :math:`e` at the end of every cycle; it is a lower bound of the peaks.

    Raises:
        ValueError: If ``first_cycle`` is zero, or a factor is out of range.

    Example:
        >>> schedule = CosineWithRestarts(first_cycle="25%", cycle_decay=0.5)
        >>> [round(schedule(tau), 3) for tau in (0.0, 0.125, 0.25, 0.375, 1.0)]
        [1.0, 0.5, 0.5, 0.25, 0.0]

    References:
        Loshchilov & Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017,
        Sec. 3.
    """

    _periods: ClassVar[tuple[str, ...]] = ("first_cycle",)

    first_cycle: DurationLike = "25%"
    cycle_multiplier: float = 1.0
    cycle_decay: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between("cycle_multiplier", self.cycle_multiplier, 1, math.inf, ends="[)")
        check_between("cycle_decay", self.cycle_decay, 0, 1, ends="(]")
        check_non_negative("end", self.end)

    @cached_property
    def _first(self) -> float:
        return self._share("first_cycle")

    @cached_property
    def _begins(self) -> list[float]:
        """Beginnings of growing cycles, in first cycles, up to one beyond the end of the budget."""
        # Sums of lengths, because a logarithm gives the wrong index at the boundaries of cycles.
        begins, length = [0.0], 1.0
        while begins[-1] <= 1.0 / self._first + 1.0:
            begins.append(begins[-1] + length)
            length *= self.cycle_multiplier
        return begins

    def factor(self, fraction: float) -> float:
        """Evaluates the formula above; ``fraction`` in [0, 1]."""
        passed = fraction / self._first
        if self.cycle_multiplier == 1.0:
            index = math.floor(passed + TOLERANCE)
            inside = passed - index
        else:
            begins = self._begins
            index = bisect_right(begins, passed + TOLERANCE) - 1
            inside = (passed - begins[index]) / (begins[index + 1] - begins[index])
        if fraction >= 1.0 and index and inside < TOLERANCE:
            # The budget ends with a cycle: the last factor is ``end``, not a new peak.
            index, inside = index - 1, 1.0
        peak = max(math.pow(self.cycle_decay, index), self.end)
        return self.end + 0.5 * (peak - self.end) * (1.0 + math.cos(math.pi * inside))

    def boundaries(self) -> dict[str, float]:
        """Returns the positions of the restarts, at most of the first 10,000."""
        if self.cycle_multiplier == 1.0:
            count = min(math.ceil(1.0 / self._first - TOLERANCE), _MOST_BOUNDARIES)
            begins: Iterable[float] = range(1, count)
        else:
            begins = self._begins[1:]
        moments = [begin * self._first for begin in begins]
        return {f"restart {i}": at for i, at in enumerate(moments, start=1) if at < 1.0 - TOLERANCE}
