"""Mixins for LightningModules: a module defines its schedule, clipping rule or batch policy."""

from lightning_bigopt.mixins.batch_size import BatchSizePolicyMixin
from lightning_bigopt.mixins.gradient_clipping import GradientClippingMixin
from lightning_bigopt.mixins.gradient_compression import GradientCompressionMixin
from lightning_bigopt.mixins.hyperparameter import HyperparameterScheduleMixin
from lightning_bigopt.mixins.learning_rate import LearningRateScheduleMixin
from lightning_bigopt.mixins.model_averaging import ModelAveragingMixin
from lightning_bigopt.mixins.monitor import OptimizationMonitorMixin
from lightning_bigopt.mixins.noise_scale import GradientNoiseScaleMixin
from lightning_bigopt.mixins.plateau import ReduceOnPlateauMixin
from lightning_bigopt.mixins.step_guard import StepGuardMixin

__all__ = [
    "BatchSizePolicyMixin",
    "GradientClippingMixin",
    "GradientCompressionMixin",
    "GradientNoiseScaleMixin",
    "HyperparameterScheduleMixin",
    "LearningRateScheduleMixin",
    "ModelAveragingMixin",
    "OptimizationMonitorMixin",
    "ReduceOnPlateauMixin",
    "StepGuardMixin",
]
