"""Callbacks for an existing Trainer, one a file."""

from lightning_bigopt.callbacks.batch_size import BatchSizeScheduler
from lightning_bigopt.callbacks.gradient_clipping import GradientClipping
from lightning_bigopt.callbacks.learning_rate import LearningRateScheduler
from lightning_bigopt.callbacks.monitor import OptimizationMonitor

__all__ = [
    "BatchSizeScheduler",
    "GradientClipping",
    "LearningRateScheduler",
    "OptimizationMonitor",
]
