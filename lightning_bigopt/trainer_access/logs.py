"""What Lightning logs, when and where: loggers and the progress bar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_bigopt.trainer_access.position import batches_that_stepped, is_fast_dev_run

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch.utils.tensorboard import SummaryWriter

__all__ = [
    "log_folder",
    "log_metrics",
    "placeholder_hides_metrics",
    "should_log",
    "show_on_progress_bar",
    "tensorboard_writers",
]


def should_log(trainer: Trainer) -> bool:
    """Whether Lightning logs the update under way.

    As its own ``should_update_logs``, which looks up the loop that is running; here that is known.
    """
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
    if is_fast_dev_run(trainer):
        return True
    return every > 0 and (
        (batches_that_stepped(trainer) + 1) % every == 0 or bool(trainer.should_stop)
    )


def log_folder(trainer: Trainer) -> str | None:
    """The folder of the first logger whose files can be read again; None where there is none.

    Not ``trainer.log_dir``, which every process must ask for.
    """
    for logger in trainer.loggers:
        if isinstance(logger, (TensorBoardLogger, CSVLogger)):
            return logger.log_dir
    return None


def log_metrics(logger: Logger, values: Mapping[str, float], *, step: int) -> None:
    """Hands values to a logger, in its file at once: Lightning's CSVLogger keeps 100 steps back."""
    logger.log_metrics(dict(values), step=step)
    if isinstance(logger, CSVLogger):
        logger.save()


def tensorboard_writers(trainer: Trainer) -> dict[Logger, tuple[SummaryWriter, str]]:
    """The Trainer's TensorBoard loggers with their writer and the prefix of their tags.

    Empty on all processes but the first, which alone has files.
    """
    if not trainer.is_global_zero:
        return {}
    return {
        logger: (
            logger.experiment,
            logger._prefix + logger.LOGGER_JOIN_CHAR if logger._prefix else "",
        )
        for logger in trainer.loggers
        if isinstance(logger, TensorBoardLogger)
    }


def placeholder_hides_metrics(trainer: Trainer) -> bool:
    """Whether Lightning writes a row of its own for TensorBoard's HParams tab.

    It does where a module or datamodule saves its hyperparameters. TensorBoard takes its columns
    from the first such row that it finds, and this one has ``hp_metric`` alone.
    """
    saving = any(
        getattr(source, "_log_hyperparams", False) and source.hparams_initial
        for source in (trainer.lightning_module, trainer.datamodule)  # type: ignore[attr-defined]
    )
    return saving and any(
        isinstance(logger, TensorBoardLogger) and logger._default_hp_metric
        for logger in trainer.loggers
    )


def show_on_progress_bar(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Shows values on the progress bar until they are shown again.

    ``LightningModule.log(prog_bar=True)`` costs about 0.4 ms a key on every step; this is a
    dictionary update. A RichProgressBar rounds numbers to three decimals, a learning rate of 3e-4
    to nothing, and shows words as they are.
    """
    shown: dict[str, Any] = {
        name: int(value) if value.is_integer() else value for name, value in values.items()
    }
    if isinstance(trainer.progress_bar_callback, RichProgressBar):
        shown = {
            name: str(value) if isinstance(value, int) else f"{value:.3g}"
            for name, value in shown.items()
        }
    trainer._logger_connector._progress_bar_metrics.update(shown)
