"""The Trainer's one clock: what has been consumed, and the budget that it is a share of."""

from lightning_bigopt.clock.limits import Simulate, resolve_horizon
from lightning_bigopt.clock.settings import ClockSettings, OnResume
from lightning_bigopt.clock.training import Counts, TrainingClock
from lightning_bigopt.counting import BatchCount

__all__ = [
    "BatchCount",
    "ClockSettings",
    "Counts",
    "OnResume",
    "Simulate",
    "TrainingClock",
    "resolve_horizon",
]
