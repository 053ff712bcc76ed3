"""ModelAveragingMixin: a LightningModule that averages its weights."""

from __future__ import annotations

from lightning_bigopt.averaging.average import Average
from lightning_bigopt.averaging.ema import EMA
from lightning_bigopt.callbacks.averaging.model_averaging import ModelAveraging
from lightning_bigopt.mixins.base import OwnedCallbackMixin

__all__ = ["ModelAveragingMixin"]


class ModelAveragingMixin(OwnedCallbackMixin):
    """A mixin for a LightningModule that averages its weights.

    List it before LightningModule among the base classes. The module returns an average from
    :meth:`configure_model_averaging`; the mixin adds a :class:`ModelAveraging` with it.

    Raises:
        TypeError: If it is listed after LightningModule.
        ValueError: If the Trainer holds a ModelAveraging too.

    Example:
        >>> import lightning as L
        >>> from lightning_bigopt import EMA, ModelAveragingMixin
        >>> class Model(ModelAveragingMixin, L.LightningModule):
        ...     def configure_model_averaging(self):
        ...         return EMA(half_life="2%")
        >>> Model().configure_model_averaging()
        EMA(half_life='2%', start=0)
    """

    owns = (ModelAveraging, "configure_model_averaging")

    def configure_model_averaging(self) -> Average | ModelAveraging:
        """Returns the average, or a :class:`ModelAveraging`; ``EMA(half_life="1%")`` by default."""
        return ModelAveraging(EMA(half_life="1%"))
