"""OptimizationMonitorMixin: a LightningModule that logs its optimization."""

from __future__ import annotations

from lightning_bigopt.callbacks.monitor import OptimizationMonitor
from lightning_bigopt.mixins.base import OwnedCallbackMixin

__all__ = ["OptimizationMonitorMixin"]


class OptimizationMonitorMixin(OwnedCallbackMixin):
    """A mixin for a LightningModule that logs learning rates, gradient norms and update sizes.

    List it before LightningModule among the base classes. The mixin adds the
    :class:`OptimizationMonitor` that :meth:`configure_optimization_monitor` returns.

    Raises:
        TypeError: If it is listed after LightningModule.
        ValueError: If the Trainer holds an OptimizationMonitor too.

    Example:
        >>> import lightning as L
        >>> from lightning_bigopt import OptimizationMonitor, OptimizationMonitorMixin
        >>> class Model(OptimizationMonitorMixin, L.LightningModule):
        ...     def configure_optimization_monitor(self):
        ...         return OptimizationMonitor(every=10, layers="parameters")
        >>> Model().configure_optimization_monitor().every
        10
    """

    owns = (OptimizationMonitor, "configure_optimization_monitor")

    def configure_optimization_monitor(self) -> OptimizationMonitor:
        """Returns the monitor; ``OptimizationMonitor()`` unless the module overrides it."""
        return OptimizationMonitor()
