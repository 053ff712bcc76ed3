"""A folder with TensorBoard events of a fit, beside the files of the Trainer's own loggers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_bigopt.trainer_access import loggers, loop, output_paths
from lightning_bigopt.trainer_access.packages import classes, own

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["EventFolder"]


class EventFolder:
    """Adds a TensorBoardLogger to the Trainer's loggers for the length of a fit.

    With a logger of its own the folder receives everything that TensorBoard can show, also the
    values that the module logs. A ``fast_dev_run`` writes nothing.

    Args:
        path: The folder; None for no logger.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path
        self._logger: Any = None

    def check(self, trainer: Trainer) -> None:
        """Raises on every process if the folder cannot be used. A collective.

        Raises:
            ValueError: If nothing can be written into the folder, or a TensorBoardLogger of the
                Trainer writes into it.
        """
        if self.path is None or loop.is_fast_dev_run(trainer):
            return
        error = self._error(trainer, self.path) if trainer.is_global_zero else None
        output_paths.raise_on_every_process(trainer, error, name="event_folder")

    def _error(self, trainer: Trainer, path: str) -> ValueError | None:
        if problem := output_paths.folder_problem(path):
            return ValueError(
                f"event_folder must be a folder that can be written to, got {path!r}, {problem}; "
                "choose another folder"
            )
        folder = Path(path).resolve()
        existing = (
            lg for lg in trainer.loggers if isinstance(lg, classes("loggers.TensorBoardLogger"))
        )
        if any(Path(logger.log_dir).resolve() == folder for logger in existing):
            return ValueError(
                "event_folder must not be the folder of a TensorBoardLogger of the Trainer, got "
                f"{path!r}; remove event_folder=, because this logger writes the same events"
            )
        return None

    def open(self, trainer: Trainer) -> None:
        """Adds the logger to the Trainer, on every process; process 0 writes."""
        if self.path is None or loop.is_fast_dev_run(trainer):
            return
        kind = _event_logger(own(trainer, "loggers.TensorBoardLogger"))
        self._logger = kind(self.path, name="", version="", default_hp_metric=False)
        trainer.loggers = [*trainer.loggers, self._logger]

    def close(self, trainer: Trainer) -> None:
        """Closes the files, and removes the logger from the Trainer."""
        if self._logger is None or self._logger not in trainer.loggers:
            return
        trainer.loggers = [lg for lg in trainer.loggers if lg is not self._logger]
        with loggers.failed_writes_warn(self._logger):
            self._logger.finalize("success")


@cache
def _event_logger(base: Any) -> Any:
    """Returns a class of TensorBoardLogger whose errors of writing are warnings.

    It writes no ``hparams.yaml``.
    """

    class EventLogger(base):  # type: ignore[misc]
        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
            with loggers.failed_writes_warn(self):
                try:
                    super().log_metrics(metrics, step)
                except ValueError as error:  # in which Lightning wraps every error
                    if isinstance(error.__cause__, OSError):
                        raise error.__cause__ from None
                    raise

        def save(self) -> None:
            with loggers.failed_writes_warn(self):
                self.experiment.flush()

    return EventLogger
