"""Durations of training in any unit, the budget, and the progress through it."""

from lightning_bigopt.durations.duration import Clock, Duration, DurationLike, Unit
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.durations.progress import Progress, Span

__all__ = ["Clock", "Duration", "DurationLike", "Horizon", "Progress", "Span", "Unit"]
