"""Amounts consumed before an update, and amounts that the updates of a run consume."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_bigopt.checks import check_count, check_positive
from lightning_bigopt.durations.duration import Clock, Duration, DurationLike, Unit

__all__ = ["Progress", "Span"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Amounts consumed before an update, in every unit.

    Args:
        fraction: Fraction of the budget, 0 at the first update.
        steps: Optimizer updates.
        batches: Loader batches of one process.
        epochs: Passes over the data, fractional inside a pass.
        samples: Samples over all processes.
        tokens: Tokens over all processes; 0 if they are not counted.
        seconds: Time of training; 0 if it is not measured.

    Example:
        >>> Progress(fraction=0.5, steps=50, samples=1600).of("10%")
        5.0
    """

    fraction: float
    steps: int = 0
    batches: int = 0
    epochs: float = 0.0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def consumed(self, unit: Unit) -> float:
        """Returns the amount consumed in ``unit``.

        Example:
            >>> Progress(fraction=0.5, steps=50).consumed("steps")
            50
        """
        amount: float = getattr(self, unit)
        return amount

    def of(self, duration: DurationLike) -> float:
        """Returns the consumed amount as a multiple of ``duration``; ``inf`` for length zero.

        Example:
            >>> Progress(fraction=0.5, steps=50).of("200 steps")
            0.25
        """
        length = Duration.parse(duration)
        return self.consumed(length.unit) / length.value if length.value else math.inf


@dataclass(frozen=True, kw_only=True)
class Span:
    """Consecutive updates that consume the same amounts.

    Args:
        updates: Number of updates.
        batches: Loader batches of one process in each update.
        samples: Samples over all processes that each update consumes; None if unknown.
        tokens: Tokens over all processes in each update; None if unknown.
        left_out: Samples among ``samples`` that are not trained, at the end of an epoch.

    Raises:
        ValueError: If an amount is not positive.

    Example:
        >>> Span(updates=10, batches=2, samples=64)
        Span(updates=10, batches=2, samples=64, tokens=None, left_out=0)
    """

    updates: int
    batches: int = 1
    samples: float | None = None
    tokens: float | None = None
    left_out: int = 0

    def __post_init__(self) -> None:
        for name in ("updates", "batches", "samples", "tokens"):
            amount = getattr(self, name)
            if name in ("updates", "batches"):
                check_count(f"Span.{name}", amount)
            elif amount is not None:
                check_positive(f"Span.{name}", amount)
        check_count("Span.left_out", self.left_out, minimum=0, of="samples")

    @property
    def global_batch_size(self) -> float | None:
        """Samples over all processes that each update trains; None if unknown."""
        return None if self.samples is None else self.samples - self.left_out

    def amount(self, clock: Clock) -> float | None:
        """Returns the amount that one update consumes in the unit of ``clock``; None if unknown.

        Example:
            >>> Span(updates=10, samples=64).amount("samples")
            64
        """
        if clock == "steps":
            return 1
        if clock == "seconds":
            return None  # depends on the machine
        amount: float | None = getattr(self, clock)
        return amount
