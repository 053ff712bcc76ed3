"""A simulated run: counts of updates, batches and samples, and its accumulation windows."""

from __future__ import annotations

import math
from bisect import bisect_right

from lightning_bigopt.batching.epoch_layout import UNBOUNDED, EpochLayout, EqualWindows
from lightning_bigopt.batching.policies.batch_size_policy import BatchContext, BatchSizePolicy
from lightning_bigopt.batching.step_function import StepFunction
from lightning_bigopt.checks import check_count, check_positive
from lightning_bigopt.durations.duration import Clock, Unit
from lightning_bigopt.durations.progress import Progress, Span

__all__ = ["SimulatedRun"]

_COUNTS: dict[str, int] = {"steps": 0, "batches": 1, "samples": 2}
_Limits = tuple[int, int, int]


class SimulatedRun:
    """Simulates the accumulation windows of a run, and counts updates, batches and samples.

    All counts are integers. A limit is the smallest count at which a section of the run ends, so
    that its end is found by comparing integers.

    Args:
        layout: Cuts an epoch into windows.
        clock: Unit of the budget: ``"steps"``, ``"batches"`` or ``"samples"``.
        budget: The budget in that unit.

    Attributes:
        steps: Updates so far.
        batches: Loader batches of one process so far.
        samples: Samples over all processes consumed so far.
        position: Position in the epoch, in the unit of the layout.

    Raises:
        ValueError: If ``budget`` is not positive and finite.
    """

    def __init__(self, layout: EpochLayout, *, clock: Clock, budget: float) -> None:
        check_positive("budget", budget)
        self.layout, self.clock, self.budget = layout, clock, budget
        self.steps = self.batches = self.samples = self.position = 0
        self._rows: list[tuple[int, int, int, int]] = []
        self._widths: dict[int, int] = {}

    def progress(self) -> Progress:
        """Returns the progress before the next update."""
        counts = (self.steps, self.batches, self.samples)
        length = self.layout.length
        epochs = 0.0 if length == UNBOUNDED else counts[_COUNTS[self.layout.unit]] / length
        return Progress(
            fraction=counts[_COUNTS[self.clock]] / self.budget,
            steps=self.steps,
            batches=self.batches,
            epochs=epochs,
            samples=self.samples,
        )

    def spans(self) -> tuple[Span, ...]:
        """Returns the windows so far; consecutive equal windows are one span."""
        # One Span object for equal rows: a run of many epochs repeats a few of them.
        spans = {
            row: Span(updates=row[0], batches=row[1], samples=row[2], left_out=row[3])
            for row in set(self._rows)
        }
        return tuple([spans[row] for row in self._rows])

    def simulate_per_update(self, policy: BatchSizePolicy, context: BatchContext) -> None:
        """Simulates any policy to the end of the budget, one call per update."""
        next_windows, end = self.layout.next_windows, self._end()
        while not self._reached(end):
            width = self._width(policy(self.progress(), context=context), policy)
            _, advance, batches, samples, left_out = next_windows(width, self.position)
            self._append(1, batches, samples, left_out)
            self._consume(1, advance, batches, samples)

    def simulate_steps(self, policy: BatchSizePolicy, steps: StepFunction) -> None:
        """Simulates a piecewise-constant policy, one closed-form step per threshold."""
        end = self._end()
        tracks = [
            (self._count_of(unit), [self._first_count(unit, a) for a in amounts], indices)
            for unit, (amounts, indices) in steps.thresholds.items()
        ]
        while not self._reached(end):
            counts = (self.steps, self.batches, self.samples)
            index = 0  # the last step, in the order written, that is reached in any unit
            for count, thresholds, indices in tracks:
                passed = bisect_right(thresholds, counts[count])
                if passed and indices[passed - 1] > index:
                    index = indices[passed - 1]
            limits = list(end)  # the current step ends at a later one in any unit
            for count, thresholds, indices in tracks:
                later = bisect_right(indices, index)
                if later < len(thresholds) and thresholds[later] < limits[count]:
                    limits[count] = thresholds[later]
            width = self._width(steps.sizes[index], policy)
            self._repeat(width, (limits[0], limits[1], limits[2]))

    def _consume(self, number: int, advance: int, batches: int, samples: int) -> None:
        self.steps += number
        self.batches += number * batches
        self.samples += number * samples
        self.position += number * advance
        if self.position >= self.layout.length:
            self.position = 0

    def _repeat(self, width: int, limits: _Limits) -> None:
        """Appends windows of one width until a count reaches its limit."""
        max_steps, max_batches, max_samples = limits
        while not self._reached(limits):
            windows = self.layout.next_windows(width, self.position)
            number, advance, batches, samples, left_out = windows
            if self.position == 0 and number < max_steps - self.steps:
                # A run of thousands of epochs takes one step per kind of window, not per epoch.
                self._repeat_epochs(width, windows, limits)
            # Rounded up: the update that reaches a limit still belongs to this width.
            number = min(
                number,
                max_steps - self.steps,
                -((self.batches - max_batches) // batches),
                -((self.samples - max_samples) // samples),
            )
            self._append(number, batches, samples, left_out)
            self._consume(number, advance, batches, samples)

    def _repeat_epochs(self, width: int, windows: EqualWindows, limits: _Limits) -> None:
        """Appends all full epochs that end below all limits."""
        epoch, position = [windows], windows.number * windows.advance
        while position < self.layout.length:
            windows = self.layout.next_windows(width, position)
            epoch.append(windows)
            position += windows.number * windows.advance
        steps = sum(w.number for w in epoch)
        batches = sum(w.number * w.batches for w in epoch)
        samples = sum(w.number * w.samples for w in epoch)
        times = min(
            (limits[0] - self.steps - 1) // steps,
            (limits[1] - self.batches - 1) // batches,
            (limits[2] - self.samples - 1) // samples,
        )
        if times < 1:
            return
        if len(epoch) == 1:  # epochs of equal windows merge into one span
            self._append(times * steps, *epoch[0][2:])
        else:
            self._rows += [(w.number, *w[2:]) for w in epoch] * times
        self.steps += times * steps
        self.batches += times * batches
        self.samples += times * samples

    def _append(self, number: int, batches: int, samples: int, left_out: int) -> None:
        rows, amounts = self._rows, (batches, samples, left_out)
        if rows and rows[-1][1:] == amounts:
            rows[-1] = (rows[-1][0] + number, *amounts)
        else:
            rows.append((number, *amounts))

    def _reached(self, limits: _Limits) -> bool:
        return self.steps >= limits[0] or self.batches >= limits[1] or self.samples >= limits[2]

    def _width(self, size: int, policy: BatchSizePolicy) -> int:
        if size not in self._widths:
            name = f"the global batch of {type(policy).__name__}"
            check_count(name, size, of="samples", hint="return an int such as 256")
            self._widths[size] = self.layout.width(size, rounding=policy.rounding, name=name)
        return self._widths[size]

    def _end(self) -> _Limits:
        limits = [UNBOUNDED, UNBOUNDED, UNBOUNDED]
        limits[self._count_of("fraction")] = self._first_count("fraction", 1.0)
        return limits[0], limits[1], limits[2]

    def _count_of(self, unit: Unit) -> int:
        """Returns the index in (steps, batches, samples) of the count that ``unit`` depends on."""
        name = {"fraction": self.clock, "epochs": self.layout.unit}.get(unit, unit)
        return _COUNTS.get(name, 2)

    def _first_count(self, unit: Unit, amount: float) -> int:
        """Returns the smallest value of that count at which ``amount`` is reached."""
        total = {"fraction": self.budget, "epochs": self.layout.length}.get(unit, 1)
        if amount <= 0:
            return 0
        if total == UNBOUNDED:
            return UNBOUNDED
        # The product may be off by a rounding error. A policy receives the quotient of progress(),
        # so that the exact count is found by the same division.
        count = max(0, math.ceil(amount * total) - 2)
        while count / total < amount:
            count += 1
        return count
