"""Horizons: the budget in every unit, and the conversion of durations to fractions of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, cast

from lightning_bigopt.checks import check_number
from lightning_bigopt.durations.conversion import (
    amounts_at_ends,
    converted,
    without_straight_corners,
)
from lightning_bigopt.durations.duration import Clock, Duration, DurationLike, amount_of
from lightning_bigopt.durations.horizon_arguments import check_counts, check_fields
from lightning_bigopt.durations.progress import Span

__all__ = ["Horizon"]

_TOLERANCE = 1e-9  # of the budget, far less than one update


@dataclass(frozen=True, kw_only=True)
class Horizon:
    """The budget of a run in every unit.

    Progress is ``consumed / budget`` in the unit of ``clock``. A duration in another unit is
    converted through ``spans``, which describe all updates of the run in order.

    Args:
        clock: Unit of the budget: ``"steps"``, loader ``"batches"``, ``"samples"``, ``"tokens"`` or
            ``"seconds"``.
        budget: Budget in that unit; positive.
        spans: The updates of the run in order; empty if they are not known in advance.
        batches_per_epoch: Loader batches of one process in an epoch; None if unknown.
        samples_per_epoch: Samples of all processes in an epoch, if epochs are counted in samples
            because their batches differ; else None.
        epochs: Budget in epochs, if a number of epochs ends the run and epochs are counted in
            batches; else None. Progress is then the fraction of the epochs, whose lengths may
            change.
        others: Other limits of the run, which epochs of other lengths than planned may reach first.
        overlong: ``"raise"`` an error for durations that do not fit, or ``"compress"`` them
            (``fast_dev_run``).
        offset: Amount consumed before this horizon begins, in the unit of ``clock``; 0 unless it is
            a part of the run (:meth:`span`).

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
    epochs: float | None = None
    others: tuple[Horizon, ...] = ()
    overlong: Literal["raise", "compress"] = "raise"
    offset: float = 0

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def of_steps(
        cls,
        total_steps: int,
        *,
        samples_per_step: int | None = None,
        tokens_per_step: int | None = None,
        steps_per_epoch: int | None = None,
    ) -> Horizon:
        """Returns the horizon of a run of equal updates with one loader batch each.

        Args:
            total_steps: Number of updates.
            samples_per_step: Samples over all processes in each update; None if unknown.
            tokens_per_step: Tokens over all processes in each update; None if unknown.
            steps_per_epoch: Updates in an epoch; None if unknown.

        Raises:
            ValueError: If a count is not positive.

        Example:
            >>> Horizon.of_steps(200).fraction(50)
            0.25
        """
        check_counts(
            total_steps=total_steps,
            samples_per_step=samples_per_step,
            tokens_per_step=tokens_per_step,
            steps_per_epoch=steps_per_epoch,
        )
        span = Span(updates=total_steps, samples=samples_per_step, tokens=tokens_per_step)
        return cls(
            clock="steps", budget=total_steps, spans=(span,), batches_per_epoch=steps_per_epoch
        )

    def total(self, clock: Clock) -> float | None:
        """Returns the budget in the unit of ``clock``; None if it is unknown.

        The last update counts in full even if the budget ends within it, as in training.

        Example:
            >>> Horizon.of_steps(10, samples_per_step=32).total("samples")
            320
        """
        if clock == self.clock:
            return self.budget
        if not (self._cumulative[self.clock] and self._cumulative[clock]):
            return None
        # Through updates, which are whole: a budget of 100 samples in updates of 32 takes 4 updates
        # and their tokens. The tolerance keeps a rounding error from adding an update.
        end = self._convert(self.offset + self.budget, self.clock, "steps")
        last = self._convert(math.ceil(end - _TOLERANCE), "steps", clock)
        return last - self._convert(self.offset, self.clock, clock)

    def fraction(
        self,
        duration: DurationLike,
        *,
        start: float = 0.0,
        stop: float | None = None,
        name: str = "duration",
    ) -> float:
        """Returns the fraction of the budget that a duration takes if it begins at ``start``.

        Args:
            duration: A duration in any unit; a percentage refers to the whole budget.
            start: Fraction of the budget at which it begins.
            stop: Fraction of the budget at which it ends; replaces ``start``.
            name: Name of the argument, for the error.

        Returns:
            The fraction; above 1 for a duration longer than the budget.

        Raises:
            ValueError: If the unit cannot be converted.

        Example:
            >>> ramp = (Span(updates=50, samples=10), Span(updates=50, samples=30))
            >>> horizon = Horizon(clock="steps", budget=100, spans=ramp)
            >>> horizon.fraction("300 samples"), horizon.fraction("300 samples", stop=1.0)
            (0.3, 0.1)
        """
        length = Duration.parse(duration, name=name)
        check_number("start", start)
        check_number("stop", start if stop is None else stop)
        if length.unit == "fraction":
            return length.value
        if length.unit == "seconds" != self.clock and self.overlong == "compress":
            return 1.0
        clock, value = self._countable(length, name)
        if clock == self.clock:
            return value / self.budget
        # If the batch grows, the same number of samples takes a different fraction of a budget in
        # updates at each position: hence the conversion at ``start`` or ``stop``.
        anchor = self.offset + (start if stop is None else stop) * self.budget
        edge = self._convert(anchor, self.clock, clock)
        other = self._convert(edge + value if stop is None else edge - value, clock, self.clock)
        return abs(other - anchor) / self.budget

    def shares(
        self, durations: Mapping[str, DurationLike], *, last: Collection[str] = ()
    ) -> tuple[float, ...]:
        """Returns the fractions of the budget of parts that must fit into it together.

        Args:
            durations: Names and lengths of the parts, which follow each other from the beginning.
            last: Names of the parts that end with the budget instead.

        Returns:
            The fractions in the order of ``durations``.

        Raises:
            ValueError: If a unit cannot be converted, or the parts are longer than the budget
                together (with ``overlong="compress"`` they are compressed instead).

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
        if total <= 1.0 + _TOLERANCE:
            return shares
        if self.overlong == "compress":
            return tuple(share / total for share in shares)
        parts = " + ".join(f"{n}={str(Duration.parse(d))!r}" for n, d in durations.items())
        raise ValueError(
            f"{' + '.join(durations)} must be at most the whole budget "
            f"({amount_of(self.budget, self.clock)}), got {parts}; shorten it, or train longer"
        )

    def axis(
        self, duration: DurationLike, *, name: str = "duration"
    ) -> tuple[tuple[float, float], ...]:
        """Returns the amount consumed in a duration's unit as a function of the fraction spent.

        Args:
            duration: Any duration in the unit of interest.
            name: Name of the argument, for the error.

        Returns:
            Corners (fraction of the budget, amount since the beginning) of a piecewise linear
            function, from fraction 0 to 1; only these two if the amount grows evenly.

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
        clock, _ = self._countable(length, name)
        per_epoch = self.samples_per_epoch or self.batches_per_epoch or 1
        one = per_epoch if length.unit == "epochs" else 1
        if clock == self.clock:
            return (0.0, 0.0), (1.0, self.budget / one)
        end = self.offset + self.budget
        inner = [mark for mark in self._cumulative[self.clock] if self.offset < mark < end]
        amounts = [
            self._convert(mark, self.clock, clock) / one for mark in (self.offset, *inner, end)
        ]
        shares = [(mark - self.offset) / self.budget for mark in inner]
        points = [
            (share, amount - amounts[0])
            for share, amount in zip((0.0, *shares, 1.0), amounts, strict=True)
        ]
        return without_straight_corners(points)

    def span(self, start: float, stop: float) -> Horizon:
        """Returns a part of this horizon as a separate horizon.

        Args:
            start: Fraction of the budget at which the part begins.
            stop: Fraction of the budget at which it ends.

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
    def _cumulative(self) -> dict[Clock, list[float]]:
        return amounts_at_ends(self.spans)

    def _countable(self, length: Duration, name: str) -> tuple[Clock, float]:
        """Returns a duration as an amount in a unit that this horizon counts.

        Raises:
            ValueError: If there is no such unit.
        """
        clock = cast("Clock", "batches" if length.unit == "epochs" else length.unit)
        value = length.value
        if length.unit == "epochs" and self.samples_per_epoch is not None:
            clock, value = "samples", value * self.samples_per_epoch
        elif length.unit == "epochs":
            if self.batches_per_epoch is None:
                raise ValueError(
                    f"{name} must not be in epochs if the length of an epoch is unknown, got "
                    f"{str(length)!r}; write it in steps, samples or percent"
                )
            value *= self.batches_per_epoch
        for needed in (self.clock, clock):
            if clock != self.clock and not self._cumulative[needed]:
                raise ValueError(
                    f"{name} must be in {self.clock} or percent here, got {str(length)!r}; the run "
                    f"is not known in advance in {needed}: {self._reason(clock)}"
                )
        return clock, value

    def _reason(self, clock: Clock) -> str:
        if "seconds" in (clock, self.clock):
            return "the number of updates in a given time depends on the machine"
        kinds = "an adaptive batch size or a loader without a length"
        return f"with {kinds} write it in {self.clock} or percent"

    def _convert(self, value: float, source: Clock, target: Clock) -> float:
        """Converts an amount counted from the start of the run to another unit."""
        return converted(value, self._cumulative[source], self._cumulative[target])
