"""GradientNoiseScaleMixin: a LightningModule that measures its gradient noise scale."""

from __future__ import annotations

from lightning_bigopt.callbacks.noise_scale import GradientNoiseScale
from lightning_bigopt.mixins.base import OwnedCallbackMixin

__all__ = ["GradientNoiseScaleMixin"]


class GradientNoiseScaleMixin(OwnedCallbackMixin):
    """A mixin for a LightningModule that measures its gradient noise scale.

    List it before LightningModule among the base classes. The mixin adds the
    :class:`GradientNoiseScale` that :meth:`configure_gradient_noise_scale` returns.

    Raises:
        TypeError: If it is listed after LightningModule.
        ValueError: If the Trainer holds a GradientNoiseScale too.

    Example:
        >>> import lightning as L
        >>> from lightning_bigopt import GradientNoiseScale, GradientNoiseScaleMixin
        >>> class Model(GradientNoiseScaleMixin, L.LightningModule):
        ...     def configure_gradient_noise_scale(self):
        ...         return GradientNoiseScale(decay=0.95)
        >>> Model().configure_gradient_noise_scale().estimator.decay
        0.95
    """

    owns = (GradientNoiseScale, "configure_gradient_noise_scale")

    def configure_gradient_noise_scale(self) -> GradientNoiseScale:
        """Returns the callback; ``GradientNoiseScale()`` unless the module overrides it."""
        return GradientNoiseScale()
