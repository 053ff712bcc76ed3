"""GradientCompressionMixin: a LightningModule that compresses its gradients."""

from __future__ import annotations

from lightning_bigopt.callbacks.gradient_compression import GradientCompression
from lightning_bigopt.gradients.compression.compressor import Compressor
from lightning_bigopt.mixins.base import OwnedCallbackMixin

__all__ = ["GradientCompressionMixin"]


class GradientCompressionMixin(OwnedCallbackMixin):
    """A mixin for a LightningModule that compresses the gradients that its processes send.

    List it before LightningModule among the base classes. The module returns a compressor from
    :meth:`configure_gradient_compression`; the mixin adds a :class:`GradientCompression` with it.

    Raises:
        TypeError: If it is listed after LightningModule.
        ValueError: If the Trainer holds a GradientCompression too.

    Example:
        >>> import lightning as L
        >>> from lightning_bigopt import GradientCompressionMixin, PowerSGD
        >>> class Model(GradientCompressionMixin, L.LightningModule):
        ...     def configure_gradient_compression(self):
        ...         return PowerSGD(rank=4)
        >>> Model().configure_gradient_compression()
        PowerSGD(rank=4, start=0)
    """

    owns = (GradientCompression, "configure_gradient_compression")

    def configure_gradient_compression(self) -> Compressor | GradientCompression:
        """Returns the compressor, or a :class:`GradientCompression` with it."""
        raise TypeError(
            f"{type(self).__name__} must define configure_gradient_compression, got "
            "GradientCompressionMixin without it; return a compressor such as PowerSGD(rank=1)"
        )
