"""Writes the HTML report of a run when its fit ends."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_bigopt.trainer_access import loggers, loop, output_paths

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["check_report", "write_run_report"]


def check_report(trainer: Trainer, report: str | None, event_folder: str | None) -> None:
    """Raises if the report could not be written at the end of the fit. A collective.

    Args:
        trainer: The Trainer.
        report: File of the report; None for no report.
        event_folder: The monitor's own folder of events; None for the folder of a logger.

    Raises:
        ValueError: If the file is a folder or cannot be written, or there are neither
            ``event_folder`` nor a TensorBoardLogger nor a CSVLogger.
        ImportError: If matplotlib or jinja2 is not installed.
    """
    if loop.is_fast_dev_run(trainer):
        return
    error = None
    if report is not None and trainer.is_global_zero:
        error = output_paths.file_error("report", report, example="report.html")
    output_paths.raise_on_every_process(trainer, error, name="report")
    if report is None:
        return
    if event_folder is None and loggers.log_folder(trainer) is None:
        kinds = ", ".join(type(logger).__name__ for logger in trainer.loggers)
        raise ValueError(
            "logger must be a TensorBoardLogger or a CSVLogger with "
            f"OptimizationMonitor(report=), got {kinds or 'none'}; write event_folder="
            "'runs/events' beside report=, pass such a logger to the Trainer, or remove report="
        )
    for module in ("jinja2", "matplotlib"):
        if find_spec(module) is None:
            raise ImportError(
                f"{module} must be installed for OptimizationMonitor(report=); run pip install "
                "'lightning-bigopt[plot]'"
            )


def write_run_report(trainer: Trainer, report: str | None, event_folder: str | None) -> None:
    """Writes the report on process 0; an error becomes a warning.

    Args:
        trainer: The Trainer.
        report: File of the report; None for no report.
        event_folder: The monitor's own folder of events; None for the folder of a logger.
    """
    if report is None or not trainer.is_global_zero or loop.is_fast_dev_run(trainer):
        return
    folder = event_folder or loggers.log_folder(trainer)
    if folder is None:
        return
    from lightning_bigopt.reporting.report import write_report
    from lightning_bigopt.reporting.runs import holds_logs

    try:
        for logger in trainer.loggers:
            logger.save()
        if holds_logs(folder):
            write_report([folder], report)
        else:
            rank_zero_info(f"No report was written, because {folder!r} contains no logs.")
    except Exception as error:  # noqa: BLE001  # it would hide an error that has ended the fit
        rank_zero_warn(
            f"The report {report!r} could not be written ({type(error).__name__}: {error}); write "
            f"it to another file with bigopt report {folder} --output FILE"
        )
