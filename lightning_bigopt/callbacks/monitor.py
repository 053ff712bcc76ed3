"""OptimizationMonitor."""

from __future__ import annotations

from lightning_bigopt.callbacks.base import OptimizationCallback
from lightning_bigopt.controllers.monitor import MonitorController

__all__ = ["OptimizationMonitor"]


class OptimizationMonitor(OptimizationCallback):
    """Logs what every update really used, to every logger of the Trainer and the progress bar.

    Values stay on the device until a logging update and are fetched together.

    Args:
        every: Log every n-th update; None follows ``Trainer(log_every_n_steps=)``.

    Logs:
        ``optim/lr[/group]``, ``grad_norm/total`` (before clipping), ``clip/coefficient``,
        ``batch/global_size`` and ``progress/samples``; ``lr`` and ``grad_norm`` on the progress
        bar. Several optimisers add their class's name.

    State:
        ``clock``: what has been consumed.

    Raises:
        ValueError: If ``every`` is not a positive int.

    Example:
        >>> from lightning_bigopt import OptimizationMonitor
        >>> OptimizationMonitor(every=10).controller.every
        10
    """

    controller: MonitorController

    def __init__(self, *, every: int | None = None) -> None:
        super().__init__(MonitorController(every=every))
