"""The layers of every optimizer, measured in logged updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_bigopt.engine.update import Update
from lightning_bigopt.monitoring.layers import LayerMonitor, Layers, LayerValue
from lightning_bigopt.monitoring.metric_buffer import MetricBuffer

__all__ = ["LayerMonitors"]


class LayerMonitors:
    """One LayerMonitor for each optimizer, by its label. Does not synchronize.

    Args:
        layers: Grouping of parameters into layers; None measures nothing.
        values: The values to measure.
    """

    def __init__(self, layers: Layers, values: Sequence[LayerValue]) -> None:
        self._layers, self._values = layers, values
        self._monitors: dict[str, LayerMonitor] = {}

    def before_step(self, update: Update, *, into: MetricBuffer) -> None:
        """Measures gradients and weights before the optimizer's step."""
        if self._layers is None:
            return
        monitor = self._monitors.get(update.label)
        if monitor is None:
            monitor = LayerMonitor(self._layers, self._values, label=update.label)
            self._monitors[update.label] = monitor
        monitor.before_step(
            update.norms,
            group=update.shard_group,
            into=into,
            is_rejected=update.rejection is not None,
        )

    def after_step(self, update: Update, *, into: MetricBuffer) -> None:
        """Measures the norm of the change in the weights."""
        monitor = self._monitors.get(update.label)
        if monitor is not None:
            monitor.after_step(group=update.shard_group, into=into)

    def end_batch(self, *, into: MetricBuffer) -> None:
        """Adds update ratios of zero for skipped updates."""
        for monitor in self._monitors.values():
            monitor.end_batch(into=into)

    def update_ratio_quantiles(self, values: Mapping[str, float]) -> dict[str, float]:
        """Returns minimum, median and maximum of the measured update-to-weight ratios."""
        quantiles: dict[str, float] = {}
        for monitor in self._monitors.values():
            quantiles.update(monitor.update_ratio_quantiles(values))
        return quantiles
