"""LearningRateScheduleMixin: a LightningModule that defines its learning-rate schedule."""

from __future__ import annotations

from lightning_bigopt.callbacks.learning_rate import LearningRateScheduler
from lightning_bigopt.mixins.base import OwnedCallbackMixin
from lightning_bigopt.schedules.base import Schedule

__all__ = ["LearningRateScheduleMixin"]


class LearningRateScheduleMixin(OwnedCallbackMixin):
    """A mixin for a LightningModule that defines its learning-rate schedule.

    List it before LightningModule among the base classes. The module returns its schedule from
    :meth:`configure_learning_rate_schedule`; the mixin adds a :class:`LearningRateScheduler` with
    it.

    Raises:
        TypeError: If it is listed after LightningModule.
        ValueError: If the Trainer holds a LearningRateScheduler too.

    Example:
        >>> import lightning as L
        >>> from lightning_bigopt import LearningRateScheduleMixin, Linear
        >>> class Model(LearningRateScheduleMixin, L.LightningModule):
        ...     def configure_learning_rate_schedule(self):
        ...         return Linear(start=1.0, end=0.0)
        >>> Model().configure_learning_rate_schedule()
        Linear(start=1.0, end=0.0)
    """

    owns = (LearningRateScheduler, "configure_learning_rate_schedule")

    def configure_learning_rate_schedule(self) -> Schedule | LearningRateScheduler:
        """Returns the schedule, or a :class:`LearningRateScheduler` with all its arguments."""
        raise TypeError(
            f"{type(self).__name__} must define configure_learning_rate_schedule, got "
            "LearningRateScheduleMixin without it; return a Schedule"
        )
