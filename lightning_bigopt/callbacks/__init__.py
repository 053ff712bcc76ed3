"""Callbacks to add to a Trainer, one per module."""

from lightning_bigopt.callbacks.averaging.model_averaging import ModelAveraging
from lightning_bigopt.callbacks.batch_size.batch_size_scheduler import BatchSizeScheduler
from lightning_bigopt.callbacks.gradient_clipping import GradientClipping
from lightning_bigopt.callbacks.gradient_compression import GradientCompression
from lightning_bigopt.callbacks.hyperparameter import HyperparameterScheduler
from lightning_bigopt.callbacks.learning_rate import LearningRateScheduler
from lightning_bigopt.callbacks.monitor import OptimizationMonitor
from lightning_bigopt.callbacks.noise_scale import GradientNoiseScale
from lightning_bigopt.callbacks.plateau import ReduceOnPlateau
from lightning_bigopt.callbacks.step_guard.replay import replay
from lightning_bigopt.callbacks.step_guard.step_guard import StepGuard
from lightning_bigopt.callbacks.step_guard.too_many_rejections import TooManyRejectionsError

__all__ = [
    "BatchSizeScheduler",
    "GradientClipping",
    "GradientCompression",
    "GradientNoiseScale",
    "HyperparameterScheduler",
    "LearningRateScheduler",
    "ModelAveraging",
    "OptimizationMonitor",
    "ReduceOnPlateau",
    "StepGuard",
    "TooManyRejectionsError",
    "replay",
]
