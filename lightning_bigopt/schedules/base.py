"""The base class of schedules, and the cooldown that can end any of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar

from lightning_bigopt.arguments import Specification
from lightning_bigopt.checks import (
    check_choice,
    check_non_negative,
    check_number,
    check_positive,
    shown,
)
from lightning_bigopt.durations.duration import Duration
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.removed import RemovedAttribute
from lightning_bigopt.schedules.part_lengths import check_fit, resolved_share
from lightning_bigopt.schedules.shapes import COOLDOWNS, TOLERANCE, CooldownShape, position
from lightning_bigopt.type_checks import check_instance

__all__ = ["CooledDown", "Schedule"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Schedule(Specification, ABC):
    """A pure function from the fraction of the budget spent to a dimensionless factor.

    The caller multiplies a base value by the factor, so that one type schedules learning rates,
    weight decays, momenta and clip thresholds. A custom schedule is a frozen dataclass with one
    method, :meth:`factor`. The class variables ``_parts`` and ``_last`` name the fields that hold
    durations: those in ``_parts`` follow each other from the beginning of the budget, those in
    ``_last`` end with it. The base class parses, checks and resolves them.

    Example:
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Parabola(Schedule):
        ...     end: float = 0.0
        ...
        ...     def factor(self, fraction: float) -> float:
        ...         return self.end + (1 - self.end) * (1 - fraction**2)
        >>> Parabola(end=0.2)(0.5)
        0.8
    """

    _used_in = "LearningRateScheduler({})"

    _parts: ClassVar[tuple[str, ...]] = ()
    _last: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if lengths := self._durations(*self._parts, *self._last):
            self._set(**lengths)
            check_fit(lengths)

    def __call__(self, fraction: float) -> float:
        """Returns the factor at a fraction of the budget; flat beyond 1.

        Args:
            fraction: Fraction of the budget consumed, non-negative. NaN, the fraction of an unknown
                budget, is allowed for a constant schedule.

        Raises:
            ValueError: If ``fraction`` is negative, or a duration has not been resolved.
        """
        if type(fraction) is not float:
            check_number("fraction", fraction, hint="write 0.5")
        if not fraction >= 0.0:  # also true for NaN
            if math.isnan(fraction) and self.is_constant:
                return self.factor(0.0)
            raise ValueError(
                f"fraction must be non-negative, got {shown(fraction)}; divide the amount consumed "
                "by the budget"
            )
        return self.factor(min(fraction, 1.0))

    @abstractmethod
    def factor(self, fraction: float) -> float:
        """Returns the factor at a ``fraction`` in [0, 1]; custom schedules implement it."""

    @property
    def is_constant(self) -> bool:
        """Whether the factor never changes, so that the length of the run may be unknown.

        Custom schedules whose factor does not depend on the fraction may override it.
        """
        return False

    def values(self, total_steps: int, *, base: float | None = None) -> list[float]:
        """Returns the factors of updates 0 … T-1 of a run with a constant batch size.

        Args:
            total_steps: Number T of updates in the run.
            base: Multiplies every factor; None for the factors themselves.

        Raises:
            ValueError: If ``total_steps`` is not positive, or a duration does not fit.

        Example:
            >>> from lightning_bigopt.schedules import WarmupLinear
            >>> WarmupLinear(warmup=4).values(8)
            [0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]
        """
        resolved = self.resolve(Horizon.of_steps(total_steps))
        factors = [resolved(step / total_steps) for step in range(total_steps)]
        return factors if base is None else [base * factor for factor in factors]

    def resolve(self, horizon: Horizon) -> Schedule:
        """Returns an equivalent schedule with all durations as fractions of a horizon's budget.

        The schedule does not change: for a longer run resolve it on a longer horizon.

        Args:
            horizon: The budget.

        Raises:
            ValueError: If a duration cannot be converted, or the parts are longer than the budget.

        Example:
            >>> from lightning_bigopt.schedules import WarmupStableDecay
            >>> WarmupStableDecay(warmup="100 steps", decay="20%").resolve(Horizon.of_steps(1000))
            WarmupStableDecay(warmup='10%', warmup_shape='linear', start=0.0,
                              decay='20%', cooldown='1-sqrt', end=0.0)
        """
        check_instance("horizon", horizon, Horizon, hint="write Horizon.of_steps(1000)")
        lengths = self._durations(*self._parts, *self._last)
        shares = horizon.shares(lengths, last=self._last)
        return self._changed(
            **{n: Duration(share, "fraction") for n, share in zip(lengths, shares, strict=True)}
        )

    def first_lengths(self) -> dict[str, Duration]:
        """Returns the durations, by field, of the parts that follow the beginning of the budget."""
        return self._durations(*self._parts)

    def boundaries(self) -> dict[str, float]:
        """Returns the named boundaries between the parts of a resolved schedule.

        Returns:
            For each name the fraction of the budget.

        Example:
            >>> from lightning_bigopt.schedules import WarmupStableDecay
            >>> WarmupStableDecay(warmup="2%", decay="20%").boundaries()
            {'warmup ends': 0.02, 'cooldown starts': 0.8}
        """
        return {}

    def warmup_end(self) -> float:
        """Returns the fraction of the budget at which the warm-up of a resolved schedule ends.

        A warm-up is a rise at the beginning that is followed by another part. A rise over the whole
        budget and the rises of a wave (:class:`Cyclic`) are not warm-ups. For a custom schedule
        this is the boundary named ``"warmup ends"``.

        Returns:
            The fraction; 0.0 without a warm-up.

        Raises:
            ValueError: If a duration has not been resolved.

        Example:
            >>> from lightning_bigopt.schedules import Linear, OneCycle
            >>> OneCycle(warmup="30%").warmup_end(), Linear().warmup_end()
            (0.3, 0.0)
        """
        return self.boundaries().get("warmup ends", 0.0)

    def with_cooldown(
        self, at: float, *, over: float, shape: CooldownShape = "1-sqrt", end: float = 0.0
    ) -> Schedule:
        """Returns this schedule up to ``at``, then a cooldown from the factor reached there.

        Args:
            at: Fraction of the budget at which the cooldown starts.
            over: Length of the cooldown as a fraction of the budget; it may end beyond the budget.
            shape: Curve of the cooldown: ``"linear"``, ``"cosine"``, ``"1-sqrt"`` or
                ``"exponential"``.
            end: Factor at the end of the cooldown.

        Raises:
            ValueError: If ``at`` is negative, ``over`` not positive, or ``end`` negative.

        Example:
            >>> from lightning_bigopt.schedules import WarmupConstant
            >>> branch = WarmupConstant(warmup="1%").with_cooldown(0.5, over=0.1, shape="linear")
            >>> [round(branch(fraction), 3) for fraction in (0.25, 0.5, 0.55, 0.8)]
            [1.0, 1.0, 0.5, 0.0]
        """
        return CooledDown(schedule=self, at=at, over=over, shape=shape, end=end)

    as_lr_scheduler = RemovedAttribute(
        "0.2",
        "write from lightning_bigopt.optimizers import as_lr_scheduler; "
        "as_lr_scheduler(schedule, optimizer, horizon)",
    )
    value = RemovedAttribute("0.2", "write base * schedule(fraction)")
    needs_base = RemovedAttribute("0.2", "a schedule is only a factor, and needs no base")
    scaled = RemovedAttribute("0.2", "write base * schedule(fraction)")

    def __repr__(self) -> str:
        arguments = ", ".join(f"{f.name}={_format(getattr(self, f.name))}" for f in fields(self))
        return f"{type(self).__name__}({arguments})"

    def _durations(self, *names: str) -> dict[str, Duration]:
        """Parses the durations in some fields; skips None in fields whose default is None."""
        optional = {field.name for field in fields(self) if field.default is None}
        held = {name: getattr(self, name) for name in names}
        return {
            name: Duration.parse(value, name=name)
            for name, value in held.items()
            if value is not None or name not in optional
        }

    def _share(self, name: str) -> float:
        """Returns the resolved duration in a field as a fraction of the budget."""
        return resolved_share(getattr(self, name), f"{type(self).__name__}.{name}")

    def _set(self, **values: Any) -> None:
        """Normalizes fields in ``__post_init__``."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _changed(self, **values: Any) -> Schedule:
        """Returns a copy with other values in some fields, or the schedule itself if equal."""
        if all(getattr(self, name) == value for name, value in values.items()):
            return self
        return replace(self, **values)


@dataclass(frozen=True, kw_only=True, repr=False)
class CooledDown(Schedule):
    r"""A schedule up to ``at``, then a cooldown; created by :meth:`Schedule.with_cooldown`.

    .. math:: s(\tau) = e + c\bigl((\tau - a) / d\bigr)\,(s_0(a) - e) \quad (\tau \ge a)

    A cooldown never rises: if :math:`s_0(a)` is below ``end``, the factor stays at :math:`s_0(a)`.
    Unlike other schedules it is flat from ``at + over`` on, even beyond the budget.

    Args:
        schedule: The schedule :math:`s_0` before the cooldown.
        at: Fraction of the budget :math:`a` at which the cooldown starts.
        over: Length of the cooldown :math:`d` as a fraction of the budget.
        shape: Curve :math:`c` of the cooldown.
        end: Factor :math:`e` at the end of the cooldown.

    Raises:
        ValueError: If ``at`` is negative, ``over`` not positive, or ``end`` negative.

    Example:
        >>> from lightning_bigopt.schedules import Constant
        >>> CooledDown(schedule=Constant(), at=0.75, over=0.5, shape="linear")(1.0)
        0.5
    """

    schedule: Schedule
    at: float
    over: float
    shape: CooldownShape = "1-sqrt"
    end: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_schedule("schedule", self.schedule)
        check_non_negative("at", self.at)
        check_positive("over", self.over)
        check_choice("shape", self.shape, CooldownShape)
        check_non_negative("end", self.end)

    @cached_property
    def _level(self) -> float:
        """Factor at which the cooldown starts."""
        return self.schedule(self.at)

    def __call__(self, fraction: float) -> float:
        """Returns the factor at a ``fraction`` that may exceed 1; flat beyond ``at + over``."""
        return self.factor(fraction) if fraction > 1.0 else super().__call__(fraction)

    def factor(self, fraction: float) -> float:
        """Evaluates the formula above; ``fraction`` may exceed 1."""
        if fraction < self.at:
            return self.schedule(fraction)
        level = self._level
        if level <= self.end:
            return level
        shape = COOLDOWNS[self.shape](position(fraction, self.at, self.over))
        return self.end + shape * (level - self.end)

    def resolve(self, horizon: Horizon) -> Schedule:
        """Resolves the inner schedule; ``at`` and ``over`` are fractions of the budget already."""
        return self._changed(schedule=self.schedule.resolve(horizon))

    def boundaries(self) -> dict[str, float]:
        """Returns the boundaries of the schedule before the cooldown, and those of the cooldown."""
        before = {n: at for n, at in self.schedule.boundaries().items() if at < self.at}
        found = {**before, "cooldown starts": self.at}
        end = self.at + self.over
        return {**found, "cooldown ends": end} if end < 1.0 - TOLERANCE else found

    def warmup_end(self) -> float:
        """Returns the end of the inner schedule's warm-up, at most the start of the cooldown."""
        return min(self.schedule.warmup_end(), self.at)


def check_schedule(name: str, value: object) -> None:
    """Raises unless a value is a schedule."""
    check_instance(name, value, Schedule, hint="for instance Cosine()")


def _format(value: Any) -> str:
    """Formats the value of a field as a user would write it."""
    if isinstance(value, Duration):
        return repr(str(value))
    if isinstance(value, tuple):
        return f"({', '.join(map(_format, value))}{',' if len(value) == 1 else ''})"
    return repr(value)
