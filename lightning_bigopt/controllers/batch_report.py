"""The plan of a run in words, worked out from its horizon."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lightning_bigopt.durations import Horizon, Progress

__all__ = ["plan_in_words", "stages"]

_SHOWN = 6


def stages(horizon: Horizon, size: Callable[[Progress], int]) -> Iterator[tuple[int, int]]:
    """The updates at which the global batch changes, and what it changes to.

    Args:
        horizon: The run, laid out.
        size: The global batch at a progress.

    Example:
        >>> horizon = Horizon.of_steps(10)
        >>> list(stages(horizon, lambda progress: 32))
        [(0, 32)]
    """
    steps = batches = 0
    samples = 0.0
    last = None
    for span in horizon.spans:
        consumed = {"steps": steps, "batches": batches, "samples": samples}.get(horizon.clock, 0)
        epochs = 0.0
        if horizon.samples_per_epoch:
            epochs = samples / horizon.samples_per_epoch
        elif horizon.batches_per_epoch:
            epochs = batches / horizon.batches_per_epoch
        now = size(
            Progress(
                fraction=consumed / horizon.budget,
                steps=steps,
                batches=batches,
                epochs=epochs,
                samples=int(samples),
            )
        )
        if now != last:
            yield steps, now
            last = now
        steps += span.updates
        batches += span.updates * span.batches
        samples += span.updates * (span.samples or 0)


def plan_in_words(first: str, changes: list[tuple[int, int]], *, updates: float | None) -> str:
    """The sentence that is printed once.

    Args:
        first: The first global batch in words.
        changes: What :func:`stages` gave, the first entry included.
        updates: Updates of the whole run; None where unknown.

    Example:
        >>> print(plan_in_words("32 = 32 × 1", [(0, 32), (50, 64)], updates=100))
        Global batch 32 = 32 × 1; 64 from update 50; 100 updates.
    """
    later = changes[1:]
    parts = [f"{size} from update {step}" for step, size in later]
    if len(parts) > _SHOWN:
        hidden = len(parts) - _SHOWN
        parts = [*parts[: _SHOWN - 1], f"… {hidden} more …", parts[-1]]
    text = "; ".join([f"Global batch {first}", *(["", *parts][1:])])
    return text + (f"; {updates:.0f} updates." if updates else ".")
