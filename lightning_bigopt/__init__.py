"""Learning-rate schedules, gradient clipping, batch-size policies and monitoring for Lightning."""

from lightning_bigopt.batching import (
    BatchSizePolicy,
    BatchSizeSteps,
    ConstantBatchSize,
)
from lightning_bigopt.callbacks import (
    BatchSizeScheduler,
    GradientClipping,
    LearningRateScheduler,
    OptimizationMonitor,
)
from lightning_bigopt.durations import Duration, Horizon, Progress
from lightning_bigopt.gradients import ClippingRule, NormClip, ValueClip
from lightning_bigopt.mixins import (
    BatchSizePolicyMixin,
    GradientClippingMixin,
    LearningRateScheduleMixin,
)
from lightning_bigopt.schedules import (
    Constant,
    Cosine,
    Linear,
    Schedule,
    WarmupCosine,
    WarmupStableDecay,
)

__version__ = "0.1.0"

__all__ = [
    "BatchSizePolicy",
    "BatchSizePolicyMixin",
    "BatchSizeScheduler",
    "BatchSizeSteps",
    "ClippingRule",
    "Constant",
    "ConstantBatchSize",
    "Cosine",
    "Duration",
    "GradientClipping",
    "GradientClippingMixin",
    "Horizon",
    "LearningRateScheduleMixin",
    "LearningRateScheduler",
    "Linear",
    "NormClip",
    "OptimizationMonitor",
    "Progress",
    "Schedule",
    "ValueClip",
    "WarmupCosine",
    "WarmupStableDecay",
    "__version__",
]
