"""Writes the HTML report of a run when its fit ends."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_bigopt.trainer_access import loggers, loop
from lightning_bigopt.type_checks import path_or_none

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["check_report", "check_report_name", "write_run_report"]


def check_report_name(report: object) -> None:
    """Raises unless ``report`` is the name of a file or None.

    Raises:
        ValueError: If it is anything else, such as an empty string.
    """
    path_or_none("report", report, hint="write 'report.html'")


def check_report(trainer: Trainer, report: str | None) -> None:
    """Raises if the report could not be written at the end of the fit.

    Args:
        trainer: The Trainer.
        report: File of the report; None for no report.

    Raises:
        ValueError: If the file is a folder, or there is no TensorBoardLogger and no CSVLogger.
        ImportError: If matplotlib or jinja2 is not installed.
    """
    if report is None or loop.is_fast_dev_run(trainer):
        return
    if Path(report).is_dir():
        raise ValueError(
            f"report must be the name of a file, got the folder {str(report)!r}; write "
            f"{str(Path(report, 'report.html'))!r}"
        )
    if loggers.log_folder(trainer) is None:
        kinds = ", ".join(type(logger).__name__ for logger in trainer.loggers)
        raise ValueError(
            "logger must be a TensorBoardLogger or a CSVLogger with "
            f"OptimizationMonitor(report=), got {kinds or 'none'}; pass one to the Trainer, or "
            "remove report="
        )
    for module in ("jinja2", "matplotlib"):
        if find_spec(module) is None:
            raise ImportError(
                f"{module} must be installed for OptimizationMonitor(report=); run pip install "
                "'lightning-bigopt[plot]'"
            )


def write_run_report(trainer: Trainer, report: str | None) -> None:
    """Writes the report on process 0; an error becomes a warning."""
    folder = loggers.log_folder(trainer) if trainer.is_global_zero else None
    if report is None or folder is None:
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
