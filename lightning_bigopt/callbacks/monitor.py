"""OptimizationMonitor."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_bigopt import trainer_access
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
        ``global_batch`` and ``skipped`` on the progress bar. Several optimizers add their class's
        name.

    State:
        ``clock``: what has been consumed.

    Raises:
        ValueError: If an argument is out of range; at fit start for ``report`` where that is a
            folder, or without a logger whose files can be read; at train start where the x axis
            counts what nobody counts, or a pattern matches no parameter.
        ImportError: At fit start for ``report`` without matplotlib or jinja2.

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
        if report is not None and not _names_a_file(report):
            raise ValueError(
                f"report must be the name of a file or None, got {report!r}; write 'report.html'"
            )
        self.report = report

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Conflicts raise here, and a report that could not be written."""
        super().on_fit_start(trainer, pl_module)
        if self.report is None or trainer_access.is_fast_dev_run(trainer):
            return
        if Path(self.report).is_dir():
            raise ValueError(
                f"report must be the name of a file, got the folder {str(self.report)!r}; write "
                f"{str(Path(self.report, 'report.html'))!r}"
            )
        if trainer_access.log_folder(trainer) is None:
            kinds = ", ".join(type(logger).__name__ for logger in trainer.loggers)
            raise ValueError(
                "logger must be a TensorBoardLogger or a CSVLogger with "
                f"OptimizationMonitor(report=), got {kinds or 'none'}; give one to the Trainer, or "
                "leave report out"
            )
        for module in ("jinja2", "matplotlib"):
            if find_spec(module) is None:
                raise ImportError(
                    f"{module} must be installed for OptimizationMonitor(report=); run pip install "
                    "'lightning-bigopt[plot]'"
                )

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
        folder = trainer_access.log_folder(trainer) if trainer.is_global_zero else None
        if self.report is None or folder is None:
            return
        from lightning_bigopt.reporting.report import write_report
        from lightning_bigopt.reporting.runs import holds_logs

        try:
            for logger in trainer.loggers:
                logger.save()
            if holds_logs(folder):
                write_report([folder], self.report)
            else:
                rank_zero_info(f"No report was written: nothing had been logged in {folder!r}.")
        except Exception as error:  # noqa: BLE001  # the run, or what ended it, counts for more
            rank_zero_warn(
                f"The report {self.report!r} could not be written ({type(error).__name__}: "
                f"{error}); write it elsewhere with bigopt report {folder}"
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is no part of a step's time."""
        self.controller.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The next step begins."""
        self.controller.resume()


def _names_a_file(path: object) -> bool:
    return isinstance(path, (str, PathLike)) and bool(fspath(path))
