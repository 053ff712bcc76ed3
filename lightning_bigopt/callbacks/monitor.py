"""OptimizationMonitor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from lightning_bigopt.callbacks.base import OptimizationCallback
from lightning_bigopt.clock import BatchCount, ClockSettings
from lightning_bigopt.controllers.layers import LayerValue
from lightning_bigopt.controllers.monitor import MonitorController, XAxis

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["OptimizationMonitor"]


class OptimizationMonitor(OptimizationCallback):
    """Logs what every update really used, to every logger of the Trainer and the progress bar.

    Values stay on the device until a logging update and are fetched together. TensorBoard gets
    one event for each logging update, and a dashboard of its own (tab *Custom scalars*).

    Args:
        every: Log every n-th update; None follows ``Trainer(log_every_n_steps=)``.
        layers: What is watched closely: ``"blocks"`` (a parameter's name up to its first number),
            ``"parameters"``, patterns by name of layer such as
            ``{"attention": "*.attn.*", "mlp": "*.mlp.*"}``, or None.
        per_layer: What is logged of each layer; None for all: ``"grad_norm"``, ``"weight_norm"``,
            ``"update_ratio"`` (copies the weights for the length of a logged update) and
            ``"zeros"``.
        histograms_every: Write histograms of every gradient to TensorBoard every n-th update;
            each one is copied to the host.
        x_axis: What TensorBoard and the other loggers count: ``"updates"`` as Lightning does,
            ``"samples"`` or ``"tokens"``.
        samples: Counts the samples in a batch (a function or a field's name); None for the
            loader's batch size.
        tokens: Counts the tokens in a batch (a function, or the name of an ids or mask field).
        report: Where the report of the run is written when the fit ends, well or not; None for
            none. Needs a TensorBoardLogger or a CSVLogger.

    Logs:
        What the table ``lightning_bigopt.reporting.TAGS`` holds; ``lr``, ``grad_norm``,
        ``global_batch`` and ``skipped`` on the progress bar. Several optimisers add their class's
        name.

    State:
        ``clock``: what has been consumed. ``skipped`` and ``clips``: refused updates, and clips
        since the last logged update.

    Raises:
        ValueError: If an argument is out of range; at train start where the x axis counts what
            nobody counts, or a pattern matches no parameter.

    Example:
        >>> from lightning_bigopt import OptimizationMonitor
        >>> OptimizationMonitor(every=10, layers="blocks").controller.every
        10
    """

    controller: MonitorController

    def __init__(
        self,
        *,
        every: int | None = None,
        layers: Literal["blocks", "parameters"] | dict[str, str] | None = "blocks",
        per_layer: Sequence[LayerValue] | None = None,
        histograms_every: int | None = None,
        x_axis: XAxis = "updates",
        samples: BatchCount = None,
        tokens: BatchCount = None,
        report: str | None = None,
    ) -> None:
        every_value: Sequence[LayerValue] = ("grad_norm", "weight_norm", "update_ratio", "zeros")
        super().__init__(
            MonitorController(
                every=every,
                layers=layers,
                per_layer=every_value if per_layer is None else per_layer,
                histograms_every=histograms_every,
                x_axis=x_axis,
                settings=ClockSettings(samples=samples, tokens=tokens),
            )
        )
        self.report = report

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undoes every patch, and writes the report."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._write_report(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Undoes every patch, and writes the report of what there was."""
        super().on_exception(trainer, pl_module, exception)
        self._write_report(trainer)

    def _write_report(self, trainer: Trainer) -> None:
        if self.report is None or not trainer.is_global_zero or trainer.log_dir is None:
            return
        from lightning_bigopt.reporting.report import write_report

        for logger in trainer.loggers:
            logger.save()
        write_report([trainer.log_dir], self.report)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is no part of a step's time."""
        self.controller.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The next step begins."""
        self.controller.resume()
