"""What a schedule is: a pure function of the fraction of the budget spent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from functools import cached_property
from importlib import import_module
from typing import Any, ClassVar

from lightning_bigopt.durations import Duration, Horizon
from lightning_bigopt.schedules.checks import (
    COOLDOWNS,
    SNAP,
    CooldownShape,
    check_choice,
    check_fit,
    check_non_negative,
    position,
    resolved_share,
)

__all__ = ["CooledDown", "Schedule"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Schedule(ABC):
    """A pure function from the fraction of the budget spent to a dimensionless factor.

    Whoever owns the base value multiplies, so one type schedules a learning rate, a weight decay,
    a momentum or a clip threshold. A schedule of your own is a frozen dataclass with one method,
    :meth:`factor`. Fields that hold durations are named in ``_parts`` (laid end to end from the
    beginning of the budget) or ``_last`` (ending with the budget); they are then parsed, checked
    and resolved for it.

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

    _parts: ClassVar[tuple[str, ...]] = ()
    _last: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        lengths = self._durations(*self._parts, *self._last)
        self._set(**lengths)
        check_fit(lengths)

    def __call__(self, fraction: float) -> float:
        """The factor when ``fraction`` of the budget is spent; flat beyond 1.

        Args:
            fraction: Share of the budget spent, non-negative.

        Raises:
            ValueError: If ``fraction`` is negative, or a duration has not been resolved.
        """
        if not fraction >= 0.0:
            raise ValueError(f"fraction must be non-negative, got {fraction!r}")
        return self.factor(min(fraction, 1.0))

    @abstractmethod
    def factor(self, fraction: float) -> float:
        """The factor at a ``fraction`` in [0, 1]: what a schedule of your own implements."""

    def value(self, fraction: float, base: float) -> float:
        """The scheduled value: ``base`` times the factor, unless a bound in absolute terms acts.

        Args:
            fraction: Share of the budget spent, non-negative.
            base: The value that the factor multiplies.

        Raises:
            ValueError: If ``fraction`` is negative, or a duration has not been resolved.

        Example:
            >>> from lightning_bigopt.schedules import Linear
            >>> Linear().value(0.75, 0.1)
            0.025
        """
        if not fraction >= 0.0:
            raise ValueError(f"fraction must be non-negative, got {fraction!r}")
        return self.scaled(min(fraction, 1.0), base)

    def scaled(self, fraction: float, base: float) -> float:
        """:meth:`value` at a ``fraction`` in [0, 1]; compositions hand it on to their parts."""
        return base * self.factor(fraction)

    @cached_property
    def needs_base(self) -> bool:
        """Whether only :meth:`value` is defined, because a bound inside is an absolute value."""
        return any(part.needs_base for part in self._inner())

    def _inner(self) -> tuple[Schedule, ...]:
        """The schedules that this one is made of."""
        return ()

    def values(self, total_steps: int, *, base: float | None = None) -> list[float]:
        """The factors of updates 0 … T-1 of a run with a constant batch.

        Args:
            total_steps: Updates in the run, T.
            base: Gives values instead of factors where it is not None.

        Raises:
            ValueError: If ``total_steps`` is not positive, or a duration does not fit.

        Example:
            >>> from lightning_bigopt.schedules import WarmupLinear
            >>> WarmupLinear(warmup=4).values(8)
            [0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]
        """
        resolved = self.resolve(Horizon.of_steps(total_steps))
        moments = [step / total_steps for step in range(total_steps)]
        if base is None:
            return [resolved(moment) for moment in moments]
        return [resolved.value(moment, base) for moment in moments]

    def resolve(self, horizon: Horizon) -> Schedule:
        """An equivalent schedule whose durations are all fractions of this horizon's budget.

        The original stays what it was: resolved anew on a longer horizon it fits the longer run.

        Raises:
            ValueError: If a duration cannot be converted, or the parts do not fit together.

        Example:
            >>> from lightning_bigopt.schedules import WarmupStableDecay
            >>> WarmupStableDecay(warmup="100 steps", decay="20%").resolve(Horizon.of_steps(1000))
            WarmupStableDecay(warmup='10%', warmup_shape='linear', start=0.0,
                              decay='20%', cooldown='1-sqrt', end=0.0)
        """
        lengths = self._durations(*self._parts, *self._last)
        shares = horizon.shares(lengths, last=self._last)
        return self._changed(
            **{n: Duration(share, "fraction") for n, share in zip(lengths, shares, strict=True)}
        )

    def boundaries(self) -> dict[str, float]:
        """The named seams of a resolved schedule, as fractions of the budget.

        Example:
            >>> from lightning_bigopt.schedules import WarmupStableDecay
            >>> WarmupStableDecay(warmup="2%", decay="20%").boundaries()
            {'warmup ends': 0.02, 'cooldown starts': 0.8}
        """
        return {}

    def with_cooldown(
        self, at: float, *, over: float, shape: CooldownShape = "1-sqrt", end: float = 0.0
    ) -> Schedule:
        """This schedule up to ``at``, then a cooldown from the factor reached there.

        Args:
            at: Share of the budget at which the cooldown starts.
            over: Share of the budget that it takes; it may end beyond the budget.
            shape: How it falls.
            end: Factor at which it ends.

        Raises:
            ValueError: If ``at`` is negative, ``over`` not positive, or ``end`` negative.

        Example:
            >>> from lightning_bigopt.schedules import WarmupConstant
            >>> branch = WarmupConstant(warmup="1%").with_cooldown(0.5, over=0.1, shape="linear")
            >>> [round(branch(fraction), 3) for fraction in (0.25, 0.5, 0.55, 0.8)]
            [1.0, 1.0, 0.5, 0.0]
        """
        return CooledDown(schedule=self, at=at, over=over, shape=shape, end=end)

    def as_lr_scheduler(self, optimizer: Any, horizon: Horizon | int) -> Any:
        """This schedule as a ``torch.optim.lr_scheduler.LRScheduler``, for use without Lightning.

        Args:
            optimizer: Its groups' ``lr`` are the bases.
            horizon: The budget; an int is updates.

        Example:
            >>> import torch
            >>> from lightning_bigopt.schedules import Linear
            >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.4)
            >>> Linear().as_lr_scheduler(optimizer, 100).get_last_lr()
            [0.4]
        """
        # A schedule knows nothing of torch; only whoever holds an optimizer calls this, and has
        # torch already.
        return import_module("lightning_bigopt.optimizers.scheduler").ScheduleLR(
            optimizer, self, horizon
        )

    def __repr__(self) -> str:
        written = ", ".join(f"{f.name}={_written(getattr(self, f.name))}" for f in fields(self))
        return f"{type(self).__name__}({written})"

    def _durations(self, *names: str) -> dict[str, Duration]:
        """The durations that these fields hold; None is left out where it is the default."""
        optional = {field.name for field in fields(self) if field.default is None}
        held = {name: getattr(self, name) for name in names}
        return {
            name: Duration.parse(value, name=name)
            for name, value in held.items()
            if value is not None or name not in optional
        }

    def _share(self, name: str) -> float:
        """A resolved duration as a fraction of the budget."""
        return resolved_share(getattr(self, name), f"{type(self).__name__}.{name}")

    def _set(self, **values: Any) -> None:
        """Normalizes fields while the instance is being made."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _changed(self, **values: Any) -> Schedule:
        """This schedule where nothing changes, otherwise a copy."""
        if all(getattr(self, name) == value for name, value in values.items()):
            return self
        return replace(self, **values)


@dataclass(frozen=True, kw_only=True, repr=False)
class CooledDown(Schedule):
    r"""A schedule that is left at ``at`` for a cooldown; see :meth:`Schedule.with_cooldown`.

    .. math:: s(\tau) = e + c\bigl((\tau - a) / d\bigr)\,(s_0(a) - e) \quad (\tau \ge a)

    A cooldown never rises: where :math:`s_0(a)` is below ``end``, it stays there. Unlike other
    schedules it becomes flat at ``at + over``, even beyond the budget.

    Args:
        schedule: The schedule :math:`s_0` before.
        at: Share of the budget :math:`a` at which the cooldown starts.
        over: Share of the budget :math:`d` that it takes.
        shape: The curve :math:`c`.
        end: The factor :math:`e` at which it ends.

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
        check_non_negative(at=self.at, over=self.over, end=self.end)
        check_choice("shape", self.shape, CooldownShape)
        if not self.over:
            raise ValueError(f"over must be positive, got {self.over!r}")

    def __call__(self, fraction: float) -> float:
        """The factor when ``fraction`` of the budget is spent; flat beyond ``at + over``."""
        if fraction < self.at:
            return self.schedule(fraction)
        return self._cool(fraction, self._level, self.end)

    def factor(self, fraction: float) -> float:
        """Follows the formula above; ``fraction`` in [0, 1]."""
        return self(fraction)

    def value(self, fraction: float, base: float) -> float:
        """The value when ``fraction`` of the budget is spent; flat beyond ``at + over``."""
        if fraction < self.at:
            return self.schedule.value(fraction, base)
        return self._cool(fraction, self.schedule.value(self.at, base), self.end * base)

    def scaled(self, fraction: float, base: float) -> float:
        """Follows the formula above, times ``base``; ``fraction`` in [0, 1]."""
        return self.value(fraction, base)

    def _cool(self, fraction: float, level: float, end: float) -> float:
        shape = COOLDOWNS[self.shape](position(fraction, self.at, self.over))
        return end + shape * (level - end) if level > end else level

    def _inner(self) -> tuple[Schedule, ...]:
        return (self.schedule,)

    @cached_property
    def _level(self) -> float:
        return self.schedule(self.at)

    def resolve(self, horizon: Horizon) -> Schedule:
        """The same on a resolved schedule; ``at`` and ``over`` are shares already."""
        return self._changed(schedule=self.schedule.resolve(horizon))

    def boundaries(self) -> dict[str, float]:
        """The seams before the cooldown, and its own."""
        before = {n: at for n, at in self.schedule.boundaries().items() if at < self.at}
        seams = {**before, "cooldown starts": self.at}
        end = self.at + self.over
        return {**seams, "cooldown ends": end} if end < 1.0 - SNAP else seams


def check_schedule(name: str, value: Any) -> None:
    """Refuses what is not a schedule."""
    if not isinstance(value, Schedule):
        raise ValueError(f"{name} must be a Schedule, got {value!r}; for instance Cosine()")


def _written(value: Any) -> str:
    """A field's value as a user would write it."""
    if isinstance(value, Duration):
        return repr(str(value))
    if isinstance(value, tuple):
        return f"({', '.join(map(_written, value))}{',' if len(value) == 1 else ''})"
    return repr(value)
