"""Computes the outline of a run: planned updates with their batch sizes and learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lightning_bigopt.durations.duration import amount_of
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.durations.progress import Progress, Span
from lightning_bigopt.optimizers.group_schedule import GroupSchedule, PlannedValue

__all__ = ["PlannedUpdate", "batch_stages", "describe_batches", "planned_updates"]

_MAX_SIZES = 6


@dataclass(frozen=True, kw_only=True)
class PlannedUpdate:
    """One update, or one fraction of a budget whose updates are not known in advance.

    Args:
        progress: Progress at the start of the update. For a fraction of the budget, only the
            fraction and the amount in the unit of the budget are set.
        is_share: Whether it is a fraction of the budget instead of an update.
        learning_rates: Learning rate of each parameter group.
        global_batch_size: Samples of the update over all processes; None if unknown.
        batches: Micro-batches of the update on one process; None if unknown.
    """

    progress: Progress
    is_share: bool = False
    learning_rates: tuple[PlannedValue, ...] = ()
    global_batch_size: float | None = None
    batches: int | None = None


def planned_updates(
    horizon: Horizon,
    groups: GroupSchedule,
    *,
    points: int = 200,
    first: int = 0,
    spent: float = 0.0,
) -> Iterator[PlannedUpdate]:
    """Yields updates spread evenly over a run, including the first and the last.

    If the updates are not known in advance, as with a budget in tokens or an adaptive batch size,
    fractions of the budget are yielded instead.

    Args:
        horizon: The horizon of the run.
        groups: The schedules of the learning rates.
        points: Approximate number of updates; the updates at which the batch size changes are
            added.
        first: Index of the first update to yield.
        spent: Fraction of the budget consumed; only used if the updates are unknown.

    Yields:
        The planned updates, in ascending order.

    Example:
        >>> horizon = Horizon.of_steps(100)
        >>> [u.progress.steps for u in planned_updates(horizon, GroupSchedule([]), points=4)]
        [0, 33, 66, 99]
    """
    starts = list(_starts(horizon))
    if not starts:
        for progress in _fractions(horizon, points, spent):
            rates = tuple(groups.planned("lr", progress))
            yield PlannedUpdate(progress=progress, is_share=True, learning_rates=rates)
        return
    last, span = starts[-1]
    total = last.steps + span.updates
    if total <= first:
        return
    count = min(points, total - first)
    chosen = {first + round(i * (total - 1 - first) / max(count - 1, 1)) for i in range(count)}
    # At most as many again: a long ramp has a span for each of thousands of sizes.
    chosen |= {start.steps for start, _ in starts[:points] if start.steps >= first}
    index = 0
    for update in sorted(chosen):
        while update >= starts[index][0].steps + starts[index][1].updates:
            index += 1
        start, span = starts[index]
        progress = _after(horizon, start, span, update - start.steps)
        yield PlannedUpdate(
            progress=progress,
            learning_rates=tuple(groups.planned("lr", progress)),
            global_batch_size=span.global_batch_size,
            batches=span.batches,
        )


def batch_stages(
    horizon: Horizon, size: Callable[[Progress], int]
) -> Iterator[tuple[Progress, int]]:
    """Yields the progress at which the global batch size changes, with the new size.

    Args:
        horizon: The horizon of the run.
        size: Returns the global batch size at a progress.

    Yields:
        The start of an update and its size; the first update of the run comes first.

    Example:
        >>> run = Horizon.of_steps(10)
        >>> [(start.steps, size) for start, size in batch_stages(run, lambda progress: 32)]
        [(0, 32)]
    """
    last = None
    for start, _ in _starts(horizon):
        now = size(start)
        if now != last:
            yield start, now
            last = now


def describe_batches(
    first: str, changes: list[tuple[Progress, int]], *, updates: float | None
) -> str:
    """Describes the planned batch sizes of a run in one sentence.

    Args:
        first: Description of the first global batch.
        changes: The result of :func:`batch_stages`, including its first entry.
        updates: Number of updates of the run; None if unknown.

    Example:
        >>> changes = [(Progress(fraction=0.0), 32), (Progress(fraction=0.5, steps=50), 64)]
        >>> print(describe_batches("32 = 32 × 1", changes, updates=100))
        Global batch 32 = 32 × 1; 64 from update 50; 100 updates.
    """
    parts = [f"{size} from update {start.steps}" for start, size in changes[1:]]
    if len(parts) > _MAX_SIZES:
        hidden = len(parts) - _MAX_SIZES
        parts = [*parts[: _MAX_SIZES - 1], f"… {hidden} more …", parts[-1]]
    text = "; ".join([f"Global batch {first}", *parts])
    return text + (f"; {amount_of(round(updates), 'updates')}." if updates else ".")


def _starts(horizon: Horizon) -> Iterator[tuple[Progress, Span]]:
    """Yields the spans of the run, each with the progress at which it starts."""
    spans = horizon.spans
    if not spans and horizon.clock == "steps":
        # A budget in updates is known even if the batch sizes are not.
        spans = (Span(updates=math.ceil(horizon.budget)),)
    start = Progress(fraction=0.0)
    for span in spans:
        yield start, span
        start = _after(horizon, start, span, span.updates)


def _after(horizon: Horizon, start: Progress, span: Span, updates: int) -> Progress:
    """Returns the progress after a number of updates of a span."""
    amounts = {
        "steps": start.steps + updates,
        "batches": start.batches + updates * span.batches,
        "samples": start.samples + int(updates * (span.samples or 0)),
        "tokens": start.tokens + int(updates * (span.tokens or 0)),
    }
    epochs = 0.0
    if horizon.samples_per_epoch:
        epochs = amounts["samples"] / horizon.samples_per_epoch
    elif horizon.batches_per_epoch:
        epochs = amounts["batches"] / horizon.batches_per_epoch
    return Progress(fraction=amounts[horizon.clock] / horizon.budget, epochs=epochs, **amounts)


def _fractions(horizon: Horizon, points: int, spent: float) -> Iterator[Progress]:
    """Yields evenly spaced fractions of the budget after those that are spent, and 0 at a start."""
    for index in range(points + 1):
        share = index / points
        if share > spent or share == spent == 0:
            consumed = {horizon.clock: round(share * horizon.budget)}
            yield Progress(fraction=share, **consumed)
