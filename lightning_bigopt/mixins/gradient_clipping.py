"""GradientClippingMixin: a LightningModule that defines its clipping rule."""

from __future__ import annotations

from lightning_bigopt.callbacks.gradient_clipping import GradientClipping
from lightning_bigopt.gradients.rules.clipping_rule import ClippingRule
from lightning_bigopt.mixins.base import OwnedCallbackMixin

__all__ = ["GradientClippingMixin"]


class GradientClippingMixin(OwnedCallbackMixin):
    """A mixin for a LightningModule that defines its clipping rule.

    List it before LightningModule among the base classes. The module returns its rule from
    :meth:`configure_clipping_rule`; the mixin adds a :class:`GradientClipping` with it.

    Raises:
        TypeError: If it is listed after LightningModule.
        ValueError: If the Trainer holds a GradientClipping too.

    Example:
        >>> import lightning as L
        >>> from lightning_bigopt import GradientClippingMixin, ValueClip
        >>> class Model(GradientClippingMixin, L.LightningModule):
        ...     def configure_clipping_rule(self):
        ...         return ValueClip(max_abs=0.5)
        >>> Model().configure_clipping_rule()
        ValueClip(max_abs=0.5)

        With other arguments than the rule, return the callback:

        >>> from lightning_bigopt import GradientClipping, NormClip
        >>> class TwoOptimizers(GradientClippingMixin, L.LightningModule):
        ...     def configure_clipping_rule(self):
        ...         return GradientClipping(NormClip(max_norm=1.0), scope="all")
        >>> TwoOptimizers().configure_clipping_rule()
        GradientClipping(NormClip(...), scope='all')
    """

    owns = (GradientClipping, "configure_clipping_rule")

    def configure_clipping_rule(self) -> ClippingRule | GradientClipping:
        """Returns the clipping rule, or a :class:`GradientClipping` with all its arguments."""
        raise TypeError(
            f"{type(self).__name__} must define configure_clipping_rule, got "
            "GradientClippingMixin without it; return a ClippingRule"
        )
