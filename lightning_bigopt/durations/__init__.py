"""Lengths of time in training, in any unit, and the whole budget that they are shares of."""

from lightning_bigopt.durations.duration import Clock, Duration, DurationLike, Unit
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.durations.progress import Progress, Span

__all__ = ["Clock", "Duration", "DurationLike", "Horizon", "Progress", "Span", "Unit"]
