"""Access to the Trainer's loggers and progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard
from urllib.parse import urlsplit
from weakref import WeakSet

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_bigopt.trainer_access import loop
from lightning_bigopt.trainer_access.packages import classes

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import Logger, TensorBoardLogger
    from torch.utils.tensorboard import SummaryWriter

__all__ = [
    "failed_writes_warn",
    "flush",
    "log_folder",
    "log_if_due",
    "log_metrics",
    "log_to_all",
    "logged_metrics",
    "loggers_with_placeholder",
    "show_on_progress_bar",
    "tensorboard_writers",
]


def log_folder(trainer: Trainer) -> str | None:
    """Returns the folder of the first TensorBoardLogger, else of the first CSVLogger, or None.

    Only TensorBoard holds texts and planned curves. Unlike ``trainer.log_dir``, which broadcasts it
    from process 0, this is not a collective.
    """
    for kind in ("loggers.TensorBoardLogger", "loggers.CSVLogger"):
        for logger in trainer.loggers:
            if isinstance(logger, classes(kind)):
                folder: str = logger.log_dir
                return folder
    return None


def log_metrics(logger: Logger, values: Mapping[str, float], *, step: int) -> None:
    """Logs values and writes them to disk; an error of writing is a warning.

    Args:
        logger: The logger.
        values: Values by tag.
        step: Step of the values.
    """
    with failed_writes_warn(logger):
        logger.log_metrics(_accepted_by(logger, values), step=step)
        if isinstance(logger, classes("loggers.CSVLogger")):
            logger.save()  # it buffers 100 steps, which a killed run would lose


def _accepted_by(logger: Logger, values: Mapping[str, float]) -> dict[str, float]:
    """Returns the values under names that the logger accepts.

    MLflow accepts only ASCII letters. Its file store makes a folder of every part of a name but the
    last one, which is a file: ``optim/lr`` and ``optim/lr/head``, of a group that was added later,
    exclude each other. There the first slash stays a slash, and the others become points.
    """
    if not isinstance(logger, classes("loggers.MLFlowLogger")):
        return dict(values)
    named = {
        "".join(c if c.isascii() else f"u{ord(c):x}" for c in tag): value
        for tag, value in values.items()
    }
    uri: str = logger.experiment.tracking_uri
    if uri.startswith("databricks") or urlsplit(uri).scheme not in ("", "file"):
        return named
    return {
        "/".join(part.replace("/", ".") for part in tag.split("/", 1)): value
        for tag, value in named.items()
    }


def flush(trainer: Trainer) -> None:
    """Writes the buffered values of all TensorBoardLoggers to their files, on process 0."""
    for logger, (writer, _) in tensorboard_writers(trainer).items():
        with failed_writes_warn(logger):
            writer.flush()


@contextmanager
def failed_writes_warn(logger: Logger) -> Iterator[None]:
    """Turns an error of writing to a logger into a warning, once for each logger.

    A full disk must not end the training: these values are about it, not its result.
    """
    try:
        yield
    except OSError as error:
        if logger not in _failed:
            _failed.add(logger)
            rank_zero_warn(
                f"{type(logger).__name__} could not write ({type(error).__name__}: {error}). The "
                "training continues, without another warning; values of lightning_bigopt are lost."
            )
        # TensorBoard raises the same error at every event; its traceback would grow each time.
        error.__traceback__ = None


_failed: WeakSet[Logger] = WeakSet()


def log_to_all(trainer: Trainer, values: Mapping[str, float], *, step: int) -> None:
    """Logs values with every logger, on process 0."""
    if values and trainer.is_global_zero:
        for logger in trainer.loggers:
            log_metrics(logger, values, step=step)


def log_if_due(trainer: Trainer, values: Callable[[], Mapping[str, float | Tensor]]) -> None:
    """Logs values of the current update, if Lightning logs this update.

    Args:
        trainer: The Trainer.
        values: Returns values by tag; called only for updates that are logged.
    """
    if trainer.loggers and loop.should_log(trainer):
        numbers = {tag: float(value) for tag, value in values().items()}
        log_to_all(trainer, numbers, step=loop.batches_that_stepped(trainer))


def logged_metrics(trainer: Trainer) -> dict[str, Tensor]:
    """Returns the last values that Lightning has logged, by tag, without the epoch.

    The public property adds what the module has logged so far, and keeps it: after an error these
    metrics would belong to an unfinished batch.
    """
    logged = trainer._logger_connector._logged_metrics
    return {name: value for name, value in logged.items() if name != "epoch"}


def tensorboard_writers(trainer: Trainer) -> dict[Logger, tuple[SummaryWriter, str]]:
    """Returns the writer and the tag prefix of each TensorBoardLogger.

    The result is empty on all processes but process 0, because only process 0 writes files.
    """
    if not trainer.is_global_zero:
        return {}
    return {
        logger: (
            logger.experiment,
            logger._prefix + logger.LOGGER_JOIN_CHAR if logger._prefix else "",
        )
        for logger in trainer.loggers
        if _is_tensorboard(logger)
    }


def _is_tensorboard(logger: Logger) -> TypeGuard[TensorBoardLogger]:
    return isinstance(logger, classes("loggers.TensorBoardLogger"))


def loggers_with_placeholder(trainer: Trainer) -> list[Logger]:
    """Returns the TensorBoardLoggers to which Lightning writes its placeholder ``hp_metric``.

    It does if a module or datamodule saves its hyperparameters. TensorBoard reads only the first
    row of a run in the HParams tab: this one, without final metrics.
    """
    is_saving = any(
        getattr(source, "_log_hyperparams", False) and source.hparams_initial
        for source in (trainer.lightning_module, trainer.datamodule)  # type: ignore[attr-defined]
    )
    return [
        logger
        for logger in trainer.loggers
        if is_saving and _is_tensorboard(logger) and logger._default_hp_metric
    ]


def show_on_progress_bar(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Shows values on the progress bar until the next call with the same names.

    Args:
        trainer: The Trainer.
        values: Values by name.
    """
    # LightningModule.log(prog_bar=True) takes about 0.4 ms per name on every step; updating the
    # dictionary that the progress bar reads takes microseconds.
    shown: dict[str, Any] = {
        name: int(value) if value.is_integer() else value for name, value in values.items()
    }
    # RichProgressBar rounds numbers to three decimals, which would show a learning rate of 3e-4 as
    # 0.000, but shows strings unchanged.
    if isinstance(trainer.progress_bar_callback, classes("callbacks.RichProgressBar")):
        shown = {
            name: str(value) if isinstance(value, int) else f"{value:.3g}"
            for name, value in shown.items()
        }
    # Not the public property, which first computes the metrics of the batch again.
    trainer._logger_connector._progress_bar_metrics.update(shown)
