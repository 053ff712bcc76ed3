"""What OptimizationMonitor writes once per fit: the plan, event files, the report."""

from __future__ import annotations

from lightning_bigopt.callbacks.run_report import check_report, write_run_report
from lightning_bigopt.engine.stage import Fit
from lightning_bigopt.monitoring import logging
from lightning_bigopt.monitoring.logged_axis import LoggedAxis, XAxis
from lightning_bigopt.trainer_access.event_folder import EventFolder

__all__ = ["RunOutput"]


class RunOutput:
    """Checks and writes the outputs at the start and at the end of a fit.

    Args:
        report: File for the report; None for no report.
        event_folder: Folder for TensorBoard events; None for no events.
        x_axis: Unit of the steps in all loggers.
    """

    def __init__(self, *, report: str | None, event_folder: str | None, x_axis: XAxis) -> None:
        self._report, self._event_folder, self._x_axis = report, event_folder, x_axis
        self._events = EventFolder(event_folder)

    def check(self, fit: Fit) -> None:
        """Raises if an output cannot be written, or the x axis is not counted. A collective.

        Raises:
            ValueError: If ``report`` or ``event_folder`` cannot be written, or the x axis is tokens
                and no callback counts them.
        """
        self._events.check(fit.trainer)
        check_report(fit.trainer, self._report, self._event_folder)
        if self._x_axis == "tokens" and fit.clock.settings.tokens is None:
            raise ValueError(
                "tokens must be counted for x_axis='tokens', got no callback that counts them; "
                "pass tokens=a function of the batch, or the name of its ids or mask"
            )

    def announce(self, fit: Fit, axis: LoggedAxis) -> None:
        """Opens the events, and writes the plan of the run to TensorBoard."""
        self._events.open(fit.trainer)
        logging.write_start(fit, axis)

    def end(self, fit: Fit) -> None:
        """Writes hyperparameters with final metrics, and the report."""
        try:
            logging.write_end(fit)
            write_run_report(fit.trainer, self._report, self._event_folder)
        finally:
            logging.release_writers(fit)
            self._events.close(fit.trainer)
