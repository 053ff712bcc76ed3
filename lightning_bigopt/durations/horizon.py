"""The whole budget in every unit, which durations are shares of."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Literal, get_args

from lightning_bigopt.durations.duration import Clock, Duration, DurationLike
from lightning_bigopt.durations.progress import Span

__all__ = ["Horizon"]

_SLACK = 1e-9
"""Shares of the budget that differ by less are the same: rounding, and far below one update."""


@dataclass(frozen=True, kw_only=True)
class Horizon:
    """The whole budget in every unit.

    Progress is ``consumed / budget`` in the unit of ``clock``. A duration in another unit is
    converted through ``spans``, the run's updates laid end to end.

    Args:
        clock: The unit of the budget: ``"steps"``, loader ``"batches"``, ``"samples"`` or
            ``"tokens"``.
        budget: The budget in that unit; positive.
        spans: The run, as runs of equal updates; empty where it is not known in advance.
        batches_per_epoch: Loader batches of one process in an epoch; None where unknown.
        samples_per_epoch: Samples of all processes in an epoch, where epochs are counted so
            because their batches differ.
        overlong: ``"raise"``, or ``"compress"`` durations that do not fit (``fast_dev_run``).
        offset: Where this horizon begins in the run, in the unit of ``clock``: 0, unless it is a
            part of the run (:meth:`span`).

    Raises:
        ValueError: If ``budget`` is not positive, or ``offset`` is negative.

    Example:
        >>> horizon = Horizon.of_steps(1000, samples_per_step=32, steps_per_epoch=100)
        >>> [horizon.fraction(length) for length in ("500 steps", "3 epochs", "3200 samples")]
        [0.5, 0.3, 0.1]
    """

    clock: Clock
    budget: float
    spans: tuple[Span, ...] = ()
    batches_per_epoch: int | None = None
    samples_per_epoch: int | None = None
    overlong: Literal["raise", "compress"] = "raise"
    offset: float = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.budget) and self.budget > 0):
            raise ValueError(f"budget must be positive and finite, got {self.budget!r}")
        if not (math.isfinite(self.offset) and self.offset >= 0):
            raise ValueError(f"offset must be non-negative and finite, got {self.offset!r}")

    @classmethod
    def of_steps(
        cls,
        total_steps: int,
        *,
        samples_per_step: int | None = None,
        tokens_per_step: int | None = None,
        steps_per_epoch: int | None = None,
    ) -> Horizon:
        """A run of ``total_steps`` equal updates, one loader batch each.

        Raises:
            ValueError: If a count is not positive.

        Example:
            >>> Horizon.of_steps(200).fraction(50)
            0.25
        """
        if total_steps <= 0:
            raise ValueError(f"total_steps must be positive, got {total_steps!r}")
        span = Span(updates=total_steps, samples=samples_per_step, tokens=tokens_per_step)
        return cls(
            clock="steps", budget=total_steps, spans=(span,), batches_per_epoch=steps_per_epoch
        )

    def total(self, clock: Clock) -> float | None:
        """The whole of it in the unit of ``clock``; None where that is not known.

        An update that begins before the end counts in full, as it does in training.

        Example:
            >>> Horizon.of_steps(10, samples_per_step=32).total("samples")
            320
        """
        if clock == self.clock:
            return self.budget
        if not (self._marks[self.clock] and self._marks[clock]):
            return None
        end = self._carry(self.offset + self.budget, self.clock, "steps")
        whole = self._carry(math.ceil(end - _SLACK), "steps", clock)
        return whole - self._carry(self.offset, self.clock, clock)

    def fraction(
        self,
        duration: DurationLike,
        *,
        start: float = 0.0,
        stop: float | None = None,
        name: str = "duration",
    ) -> float:
        """The share of the budget that ``duration`` takes when it begins at ``start``.

        Args:
            duration: A duration in any unit; a percentage is a share of the whole budget.
            start: Where it begins, as a share of the budget.
            stop: Where it ends, as a share of the budget, instead of where it begins.
            name: The argument's name, for the error.

        Returns:
            The share, above 1 where the duration is longer than the budget.

        Raises:
            ValueError: If the unit cannot be converted, with the reason and the way out.

        Example:
            >>> ramp = (Span(updates=50, samples=10), Span(updates=50, samples=30))
            >>> horizon = Horizon(clock="steps", budget=100, spans=ramp)
            >>> horizon.fraction("300 samples"), horizon.fraction("300 samples", stop=1.0)
            (0.3, 0.1)
        """
        length = Duration.parse(duration, name=name)
        if length.unit == "fraction":
            return length.value
        clock, value = self._count(length, name)
        if clock == self.clock:
            return value / self.budget
        anchor = self.offset + (start if stop is None else stop) * self.budget
        edge = self._carry(anchor, self.clock, clock)
        other = self._carry(edge + value if stop is None else edge - value, clock, self.clock)
        return abs(other - anchor) / self.budget

    def shares(
        self, durations: Mapping[str, DurationLike], *, last: Collection[str] = ()
    ) -> tuple[float, ...]:
        """The shares of parts that must fit into the budget together.

        They are laid end to end from the beginning; those named in ``last`` end with the budget.

        Raises:
            ValueError: If they are longer than the budget; compressed instead where
                ``overlong="compress"``.

        Example:
            >>> Horizon.of_steps(100).shares({"warmup": 10, "decay": "20%"}, last=["decay"])
            (0.1, 0.2)
        """
        found: dict[str, float] = {}
        start, stop = 0.0, 1.0
        for name, duration in durations.items():
            if name not in last:
                found[name] = self.fraction(duration, start=start, name=name)
                start += found[name]
        for name, duration in list(durations.items())[::-1]:
            if name in last:
                found[name] = self.fraction(duration, stop=stop, name=name)
                stop -= found[name]
        shares = tuple(found[name] for name in durations)
        total = math.fsum(shares)
        if total <= 1.0 + _SLACK:
            return shares
        if self.overlong == "compress":
            return tuple(share / total for share in shares)
        written = " + ".join(f"{n}={str(Duration.parse(d))!r}" for n, d in durations.items())
        raise ValueError(
            f"{' + '.join(durations)} must be at most the whole budget "
            f"({self.budget:g} {self.clock}), got {written}; shorten it, or train longer"
        )

    def axis(
        self, duration: DurationLike, *, name: str = "duration"
    ) -> tuple[tuple[float, float], ...]:
        """How the amount in a duration's unit grows with the share of the budget.

        Args:
            duration: Any duration in the unit of interest.
            name: The argument's name, for the error.

        Returns:
            The corners of a line through (share of the budget, amount since the beginning), from
            share 0 to share 1; only these two where the amount grows evenly.

        Raises:
            ValueError: If the unit cannot be converted.

        Example:
            >>> ramp = (Span(updates=50, samples=10), Span(updates=50, samples=30))
            >>> Horizon(clock="steps", budget=100, spans=ramp).axis("1 sample")
            ((0.0, 0.0), (0.5, 500.0), (1.0, 2000.0))
        """
        length = Duration.parse(duration, name=name)
        if length.unit == "fraction":
            return (0.0, 0.0), (1.0, 1.0)
        clock, _ = self._count(length, name)
        one = self.batches_per_epoch or 1 if length.unit == "epochs" else 1
        if clock == self.clock:
            return (0.0, 0.0), (1.0, self.budget / one)
        end = self.offset + self.budget
        inner = [mark for mark in self._marks[self.clock] if self.offset < mark < end]
        amounts = [
            self._carry(mark, self.clock, clock) / one for mark in (self.offset, *inner, end)
        ]
        shares = [(mark - self.offset) / self.budget for mark in inner]
        points = [
            (share, amount - amounts[0])
            for share, amount in zip((0.0, *shares, 1.0), amounts, strict=True)
        ]
        total = points[-1][1]
        if all(
            math.isclose(amount, share * total, abs_tol=_SLACK * total) for share, amount in points
        ):
            return points[0], points[-1]
        return tuple(points)

    def span(self, start: float, stop: float) -> Horizon:
        """The part of this horizon from share ``start`` to share ``stop``, as a horizon of its own.

        Raises:
            ValueError: If the part is empty.

        Example:
            >>> Horizon.of_steps(1000).span(0.5, 1.0).fraction("250 steps")
            0.5
        """
        return replace(
            self,
            budget=(stop - start) * self.budget,
            offset=self.offset + start * self.budget,
        )

    @cached_property
    def _marks(self) -> dict[Clock, list[float]]:
        """Cumulative amounts at the seams of the spans; empty for a unit that is unknown."""
        marks: dict[Clock, list[float]] = {}
        for clock in get_args(Clock):
            each = [span.amount(clock) for span in self.spans]
            known = [s.updates * a for s, a in zip(self.spans, each, strict=True) if a is not None]
            complete = known and len(known) == len(each)
            marks[clock] = list(accumulate(known, initial=0)) if complete else []
        return marks

    def _count(self, length: Duration, name: str) -> tuple[Clock, float]:
        """A duration as an amount of what this horizon can count."""
        if length.unit == "fraction":
            return self.clock, length.value * self.budget
        clock: Clock = "batches" if length.unit == "epochs" else length.unit
        value = length.value
        if length.unit == "epochs" and self.samples_per_epoch is not None:
            clock, value = "samples", value * self.samples_per_epoch
        elif length.unit == "epochs":
            if self.batches_per_epoch is None:
                raise ValueError(
                    f"{name} must not be in epochs where the length of an epoch is unknown, got "
                    f"{str(length)!r}; write it in steps, samples or percent"
                )
            value *= self.batches_per_epoch
        for needed in (self.clock, clock):
            if clock != self.clock and not self._marks[needed]:
                raise ValueError(
                    f"{name} must be in {self.clock} or percent here, got {str(length)!r}: the run "
                    f"is not known in advance in {needed}; with an adaptive batch size or a loader "
                    f"without length write it in {self.clock} or percent"
                )
        return clock, value

    def _carry(self, value: float, source: Clock, target: Clock) -> float:
        """Carries an amount counted from the start of the run over to another unit."""
        have, want = self._marks[source], self._marks[target]
        index = max(0, bisect_right(have, value) - 1)
        if value == have[index]:
            return want[index]
        index = min(index, len(self.spans) - 1)
        each = (want[index + 1] - want[index]) / (have[index + 1] - have[index])
        return want[index] + (value - have[index]) * each
