"""LearningRateScheduleMixin."""

from __future__ import annotations

from lightning_bigopt.callbacks.learning_rate import LearningRateScheduler
from lightning_bigopt.mixins.base import OwnedCallbackMixin
from lightning_bigopt.schedules import Schedule

__all__ = ["LearningRateScheduleMixin"]


class LearningRateScheduleMixin(OwnedCallbackMixin):
    """A LightningModule that owns its learning-rate schedule; stands before it among the bases.

    The module says which schedule in :meth:`configure_learning_rate_schedule`; everything else is
    :class:`LearningRateScheduler`, whose code this drives.

    Raises:
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
        """The schedule of the learning rate, or a whole :class:`LearningRateScheduler`."""
        raise TypeError(
            f"{type(self).__name__} must define configure_learning_rate_schedule, got "
            "LearningRateScheduleMixin without it; return a Schedule"
        )
