"""GradientClippingMixin."""

from __future__ import annotations

from lightning_bigopt.callbacks.gradient_clipping import GradientClipping
from lightning_bigopt.gradients import ClippingRule
from lightning_bigopt.mixins.base import OwnedCallbackMixin

__all__ = ["GradientClippingMixin"]


class GradientClippingMixin(OwnedCallbackMixin):
    """A LightningModule that owns its gradient clipping; stands before it among the bases.

    The module says which rule in :meth:`configure_clipping_rule`; everything else is
    :class:`GradientClipping`, whose code this drives.

    Raises:
        ValueError: If the Trainer holds a GradientClipping too.

    Example:
        >>> import lightning as L
        >>> from lightning_bigopt import GradientClippingMixin, ValueClip
        >>> class Model(GradientClippingMixin, L.LightningModule):
        ...     def configure_clipping_rule(self):
        ...         return ValueClip(max_abs=0.5)
        >>> Model().configure_clipping_rule()
        ValueClip(max_abs=0.5)
    """

    owns = (GradientClipping, "configure_clipping_rule")

    def configure_clipping_rule(self) -> ClippingRule | GradientClipping:
        """The rule that limits the gradient, or a whole :class:`GradientClipping`."""
        raise TypeError(
            f"{type(self).__name__} must define configure_clipping_rule, got "
            "GradientClippingMixin without it; return a ClippingRule"
        )
