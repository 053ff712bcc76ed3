"""A run being laid out, window by window or whole epochs at one stroke."""

from __future__ import annotations

import math
from bisect import bisect_right

from lightning_bigopt.batching.geometry import ENDLESS, Geometry, Windows
from lightning_bigopt.batching.policies import BatchContext, BatchSizePolicy, check_size
from lightning_bigopt.batching.staircase import Staircase
from lightning_bigopt.durations import Clock, Progress, Span, Unit

__all__ = ["Run"]

_COUNTERS: dict[Clock, int] = {"steps": 0, "batches": 1, "samples": 2, "tokens": 2}
_Limits = tuple[int, int, int]


class Run:
    """What a run has consumed, its place in the epoch, and its windows so far.

    All counts are integers. A limit is the first count at which something ends, so that reaching
    it is a comparison of ints.

    Attributes:
        steps: Updates so far.
        batches: Loader batches of one process so far.
        samples: Samples over all processes so far.
        position: Place in the epoch, in the geometry's unit.
    """

    def __init__(
        self, geometry: Geometry, *, clock: Clock, budget: float, tokens_per_sample: int | None
    ) -> None:
        if not (budget > 0 and math.isfinite(budget)):
            raise ValueError(f"budget must be positive and finite, got {budget!r}")
        self.geometry, self.clock, self.budget = geometry, clock, budget
        self.tokens_per_sample = tokens_per_sample
        self.steps = self.batches = self.samples = self.position = 0
        self._rows: list[tuple[int, int, int]] = []
        self._widths: dict[int, int] = {}

    def progress(self) -> Progress:
        """What the update about to begin sees."""
        counts = (self.steps, self.batches, self.samples)
        tokens = self.samples * (self.tokens_per_sample or 0)
        used = tokens if self.clock == "tokens" else counts[_COUNTERS[self.clock]]
        length = self.geometry.length
        return Progress(
            fraction=used / self.budget,
            steps=self.steps,
            batches=self.batches,
            epochs=0.0 if length == ENDLESS else counts[self.geometry.counter] / length,
            samples=self.samples,
            tokens=tokens,
        )

    def spans(self) -> tuple[Span, ...]:
        """The windows so far."""
        tokens, made = self.tokens_per_sample, {}
        for row in set(self._rows):
            updates, batches, samples = row
            made[row] = Span(
                updates=updates,
                batches=batches,
                samples=samples,
                tokens=None if tokens is None else samples * tokens,
            )
        return tuple([made[row] for row in self._rows])

    def walk(self, policy: BatchSizePolicy, context: BatchContext) -> None:
        """Asks the policy update by update to the end of the budget."""
        ahead, end = self.geometry.ahead, self._end()
        while not self._reached(end):
            width = self._width(policy(self.progress(), context=context), policy)
            _, advance, batches, samples = ahead(width, self.position)
            self._append(1, batches, samples)
            self.consume(1, advance, batches, samples)

    def climb(self, policy: BatchSizePolicy, stairs: Staircase) -> None:
        """Runs stairs to the end of the budget, each at one stroke."""
        end = self._end()
        tracks = [
            (self._counter(unit), [self._first(unit, mark) for mark in marks], indices)
            for unit, (marks, indices) in stairs.marks.items()
        ]
        while not self._reached(end):
            counts = (self.steps, self.batches, self.samples)
            index = 0
            for counter, marks, indices in tracks:
                passed = bisect_right(marks, counts[counter])
                if passed and indices[passed - 1] > index:
                    index = indices[passed - 1]
            limits = list(end)
            for counter, marks, indices in tracks:
                later = bisect_right(indices, index)
                if later < len(marks) and marks[later] < limits[counter]:
                    limits[counter] = marks[later]
            width = self._width(stairs.sizes[index], policy)
            self._repeat(width, (limits[0], limits[1], limits[2]))

    def consume(self, count: int, advance: int, batches: int, samples: int) -> None:
        """Moves on by ``count`` equal windows."""
        self.steps += count
        self.batches += count * batches
        self.samples += count * samples
        self.position += count * advance
        if self.position >= self.geometry.length:
            self.position = 0

    def _repeat(self, width: int, limits: _Limits) -> None:
        """Equal windows until a count reaches its limit."""
        most_steps, most_batches, most_samples = limits
        while not self._reached(limits):
            row = self.geometry.ahead(width, self.position)
            count, advance, batches, samples = row
            if self.position == 0 and count < most_steps - self.steps:
                self._repeat_epochs(width, row, limits)
            count = min(
                count,
                most_steps - self.steps,
                -((self.batches - most_batches) // batches),
                -((self.samples - most_samples) // samples),
            )
            self._append(count, batches, samples)
            self.consume(count, advance, batches, samples)

    def _repeat_epochs(self, width: int, row: Windows, limits: _Limits) -> None:
        """Lays down every whole epoch that ends below all limits."""
        epoch, position = [row], row.number * row.advance
        while position < self.geometry.length:
            row = self.geometry.ahead(width, position)
            epoch.append(row)
            position += row.number * row.advance
        steps = sum(row.number for row in epoch)
        batches = sum(row.number * row.batches for row in epoch)
        samples = sum(row.number * row.samples for row in epoch)
        times = min(
            (limits[0] - self.steps - 1) // steps,
            (limits[1] - self.batches - 1) // batches,
            (limits[2] - self.samples - 1) // samples,
        )
        if times < 1:
            return
        if len(epoch) == 1:
            self._append(times * steps, epoch[0].batches, epoch[0].samples)
        else:
            self._rows += [(row.number, row.batches, row.samples) for row in epoch] * times
        self.steps += times * steps
        self.batches += times * batches
        self.samples += times * samples

    def _append(self, count: int, batches: int, samples: int) -> None:
        rows = self._rows
        if rows and rows[-1][1] == batches and rows[-1][2] == samples:
            rows[-1] = (rows[-1][0] + count, batches, samples)
        else:
            rows.append((count, batches, samples))

    def _reached(self, limits: _Limits) -> bool:
        return self.steps >= limits[0] or self.batches >= limits[1] or self.samples >= limits[2]

    def _width(self, size: int, policy: BatchSizePolicy) -> int:
        if size not in self._widths:
            check_size(f"the global batch of {type(policy).__name__}", size)
            self._widths[size] = self.geometry.width(size, policy)
        return self._widths[size]

    def _end(self) -> _Limits:
        limits = [ENDLESS, ENDLESS, ENDLESS]
        limits[self._counter("fraction")] = self._first("fraction", 1.0)
        return limits[0], limits[1], limits[2]

    def _counter(self, unit: Unit) -> int:
        """Which of (steps, batches, samples) moves ``unit``."""
        if unit == "fraction":
            return _COUNTERS[self.clock]
        return {"steps": 0, "epochs": self.geometry.counter}.get(unit, 2)

    def _first(self, unit: Unit, mark: float) -> int:
        """The first value of that counter at which ``mark`` is reached."""
        in_tokens = unit == "tokens" or (unit == "fraction" and self.clock == "tokens")
        each = (self.tokens_per_sample or 0) if in_tokens else 1
        whole = {"fraction": self.budget, "epochs": self.geometry.length}.get(unit, 1)
        if mark <= 0:
            return 0
        if not each or whole == ENDLESS:
            return ENDLESS
        count = max(0, math.ceil(mark * whole / each) - 2)
        while count * each / whole < mark:  # the very division that Progress makes
            count += 1
        return count
