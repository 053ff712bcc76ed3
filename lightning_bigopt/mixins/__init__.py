"""Mixins for LightningModules: a module defines its schedule, clipping rule or batch policy."""

from lightning_bigopt.mixins.batch_size import BatchSizePolicyMixin
from lightning_bigopt.mixins.gradient_clipping import GradientClippingMixin
from lightning_bigopt.mixins.learning_rate import LearningRateScheduleMixin

__all__ = ["BatchSizePolicyMixin", "GradientClippingMixin", "LearningRateScheduleMixin"]
