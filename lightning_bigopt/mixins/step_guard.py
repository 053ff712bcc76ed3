"""StepGuardMixin: a LightningModule that skips bad updates."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_bigopt.callbacks.step_guard.step_guard import StepGuard
from lightning_bigopt.gradients.guard import Detector
from lightning_bigopt.mixins.base import OwnedCallbackMixin

__all__ = ["StepGuardMixin"]


class StepGuardMixin(OwnedCallbackMixin):
    """A mixin for a LightningModule that skips bad updates.

    List it before LightningModule among the base classes. The mixin adds the :class:`StepGuard`
    that :meth:`configure_step_guard` returns.

    Raises:
        TypeError: If it is listed after LightningModule.
        ValueError: If the Trainer holds a StepGuard too.

    Example:
        >>> import lightning as L
        >>> from lightning_bigopt import NonFinite, StepGuard, StepGuardMixin
        >>> class Model(StepGuardMixin, L.LightningModule):
        ...     def configure_step_guard(self):
        ...         return StepGuard([NonFinite()], max_consecutive=5)
        >>> Model().configure_step_guard()
        StepGuard([NonFinite()])
    """

    owns = (StepGuard, "configure_step_guard")

    def configure_step_guard(self) -> StepGuard | Sequence[Detector]:
        """Returns the guard, or its detectors; ``StepGuard()`` unless the module overrides it."""
        return StepGuard()
