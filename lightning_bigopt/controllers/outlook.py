"""The run as planned: what each coming update starts from, and what it will use."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_bigopt.durations import Horizon, Progress, Span

if TYPE_CHECKING:
    from lightning_bigopt.controllers.base import Controller
    from lightning_bigopt.controllers.learning_rate import LearningRateController

__all__ = ["PlannedUpdate", "planned_rate", "planned_shares", "planned_updates"]


@dataclass(frozen=True, kw_only=True)
class PlannedUpdate:
    """One update, before anything is trained.

    Args:
        progress: What will have been consumed before it.
        global_batch_size: Samples over all processes; None where unknown.
        batches: Micro-batches of one process.
    """

    progress: Progress
    global_batch_size: float | None
    batches: int


def planned_updates(
    horizon: Horizon, *, points: int = 200, first: int = 0
) -> Iterator[PlannedUpdate]:
    """Updates spread evenly over a run, its first and last among them.

    Args:
        horizon: The run; nothing comes of one whose updates are not known in advance.
        points: About how many.
        first: The first update to be shown.

    Example:
        >>> [u.progress.steps for u in planned_updates(Horizon.of_steps(100), points=4)]
        [0, 33, 66, 99]
    """
    spans = horizon.spans
    if not spans and horizon.clock == "steps":
        spans = (Span(updates=math.ceil(horizon.budget)),)
    total = sum(span.updates for span in spans)
    if total <= first:
        return
    count = min(points, total - first)
    wanted = {first + round(i * (total - 1 - first) / max(count - 1, 1)) for i in range(count)}
    starts, start = [], Progress(fraction=0.0)
    for span in spans:
        starts.append(start)
        start = _ahead(horizon, start, span, span.updates)
    wanted |= {s.steps for s in starts[:points] if s.steps >= first}  # where the batch changes
    index = 0
    for update in sorted(wanted):
        while update >= starts[index].steps + spans[index].updates:
            index += 1
        span = spans[index]
        yield PlannedUpdate(
            progress=_ahead(horizon, starts[index], span, update - starts[index].steps),
            global_batch_size=span.samples,
            batches=span.batches,
        )


def planned_shares(
    horizon: Horizon, *, points: int = 200, first: float = 0.0
) -> Iterator[Progress]:
    """Shares spread evenly over a budget whose updates are not known in advance.

    What has been consumed then is known in the unit of the budget only.

    Args:
        horizon: The run.
        points: Into how many parts it is cut.
        first: The share that has been spent; only what comes is given, and the beginning.

    Example:
        >>> horizon = Horizon(clock="tokens", budget=2e9)
        >>> [p.tokens for p in planned_shares(horizon, points=2)]
        [0, 1000000000, 2000000000]
    """
    for index in range(points + 1):
        share = index / points
        if share > first or share == first == 0:
            consumed = {horizon.clock: round(share * horizon.budget)}
            yield Progress(fraction=share, **consumed)


def planned_rate(
    owner: LearningRateController,
    controllers: Iterable[Controller],
    progress: Progress,
    *,
    group: str | None,
    base: float,
    optimizer: str = "",
) -> float:
    """The learning rate of a parameter group at a point of the run."""
    factor = math.prod(c.learning_rate_factor(progress) for c in controllers)
    return owner.value(group, progress.fraction, base, optimizer=optimizer) * factor


def _ahead(horizon: Horizon, start: Progress, span: Span, updates: int) -> Progress:
    steps, batches = start.steps + updates, start.batches + updates * span.batches
    samples = start.samples + int(updates * (span.samples or 0))
    tokens = start.tokens + int(updates * (span.tokens or 0))
    consumed = {"steps": steps, "batches": batches, "samples": samples, "tokens": tokens}
    each = horizon.batches_per_epoch
    return Progress(
        fraction=consumed[horizon.clock] / horizon.budget,
        steps=steps,
        batches=batches,
        epochs=batches / each if each else 0.0,
        samples=samples,
        tokens=tokens,
    )
