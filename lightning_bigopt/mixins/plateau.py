"""ReduceOnPlateauMixin: a LightningModule that reduces its learning rate on a plateau."""

from __future__ import annotations

from lightning_bigopt.callbacks.plateau import ReduceOnPlateau
from lightning_bigopt.mixins.base import OwnedCallbackMixin

__all__ = ["ReduceOnPlateauMixin"]


class ReduceOnPlateauMixin(OwnedCallbackMixin):
    """A mixin for a LightningModule whose learning rate falls when a metric stops improving.

    List it before LightningModule among the base classes. The module returns the name of the metric
    from :meth:`configure_reduce_on_plateau`; the mixin adds a :class:`ReduceOnPlateau` with it. It
    needs a :class:`LearningRateScheduler`, such as that of a :class:`LearningRateScheduleMixin`.

    Raises:
        TypeError: If it is listed after LightningModule.
        ValueError: If the Trainer holds a ReduceOnPlateau too.

    Example:
        >>> import lightning as L
        >>> from lightning_bigopt import ReduceOnPlateau, ReduceOnPlateauMixin
        >>> class Model(ReduceOnPlateauMixin, L.LightningModule):
        ...     def configure_reduce_on_plateau(self):
        ...         return ReduceOnPlateau("val_loss", patience=5)
        >>> Model().configure_reduce_on_plateau().monitor
        'val_loss'
    """

    owns = (ReduceOnPlateau, "configure_reduce_on_plateau")

    def configure_reduce_on_plateau(self) -> ReduceOnPlateau | str:
        """Returns the name of the metric, or a :class:`ReduceOnPlateau` with all its arguments."""
        raise TypeError(
            f"{type(self).__name__} must define configure_reduce_on_plateau, got "
            "ReduceOnPlateauMixin without it; return the name of a logged metric, such as "
            '"val_loss"'
        )
