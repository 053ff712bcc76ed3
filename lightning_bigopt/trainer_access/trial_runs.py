"""Trial runs: fits with other callbacks, without loggers and messages."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lightning_bigopt.batching.randomness import preserve_random_state
from lightning_bigopt.trainer_access.loop import is_last_batch, is_unlimited
from lightning_bigopt.trainer_access.packages import own

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.strategies import Strategy

__all__ = [
    "call_before_batch",
    "exit_fit",
    "fit_quietly",
    "is_at_end",
    "is_out_of_memory",
    "limits_kept",
    "set_max_steps",
    "silent_information",
    "silent_loggers",
    "stop_now",
]

_HOOK = "on_train_batch_start"


def call_before_batch(trainer: Trainer, function: Callable[[], None] | None) -> None:
    """Calls a function before each training batch, also of a trial that has other callbacks.

    Args:
        trainer: The Trainer.
        function: Called after the hooks of the callbacks and the module; None for none.
    """
    # Lightning calls this hook of the strategy in every loop; see replace_saved_weights.
    vars(trainer.strategy).pop(_HOOK, None)
    if function is not None:
        vars(trainer.strategy)[_HOOK] = partial(_begin_batch, trainer.strategy, function)


def _begin_batch(strategy: Strategy, function: Callable[[], None], *arguments: Any) -> None:
    function()
    getattr(type(strategy), _HOOK)(strategy, *arguments)


def exit_fit(trainer: Trainer) -> BaseException:
    """Returns an error that ends the fit, and that Lightning catches without ``on_exception``."""
    error: BaseException = own(trainer, "utilities.exceptions._TunerExitException")()
    return error


def fit_quietly(
    trainer: Trainer,
    module: LightningModule,
    train_dataloaders: Any,
    *,
    datamodule: Any,
    callbacks: Sequence[Callback],
    ckpt_path: Any = None,
) -> None:
    """Runs ``trainer.fit`` with other callbacks, and without loggers and Lightning's advice.

    Callbacks, loggers and limits of the Trainer and the random states are restored, also after an
    error.

    Args:
        trainer: The Trainer.
        module: As for ``Trainer.fit``.
        train_dataloaders: As for ``Trainer.fit``.
        datamodule: As for ``Trainer.fit``.
        callbacks: The callbacks that replace the Trainer's.
        ckpt_path: As for ``Trainer.fit``.
    """
    saved = trainer.callbacks, trainer.loggers  # type: ignore[attr-defined]
    trainer.callbacks = list(callbacks)  # type: ignore[attr-defined]
    # Not an empty list: a module may call self.logger.log_metrics.
    trainer.loggers = silent_loggers(trainer)
    try:
        with (
            preserve_random_state(trainer.strategy.root_device),
            limits_kept(trainer),
            warnings.catch_warnings(),
        ):
            advice = own(trainer, "fabric.utilities.warnings.PossibleUserWarning")
            warnings.simplefilter("ignore", advice)  # the user's own fit repeats it
            trainer.fit(module, train_dataloaders, datamodule=datamodule, ckpt_path=ckpt_path)
    finally:
        trainer.callbacks, trainer.loggers = saved  # type: ignore[attr-defined]


@contextmanager
def silent_information() -> Iterator[None]:
    """Silences the information that Lightning and callbacks log on process 0, such as plans."""
    packages = ("lightning.pytorch", "pytorch_lightning")
    loggers = [logging.getLogger(f"{name}.utilities.rank_zero") for name in packages]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def limits_kept(trainer: Trainer) -> Iterator[None]:
    """Disables the sanity check, and restores it and the limits of epochs when the block ends.

    Lightning sets ``max_epochs`` of a Trainer without limits when a fit begins.
    """
    loop = trainer.fit_loop
    kept = loop.min_epochs, loop.max_epochs, trainer.num_sanity_val_steps
    trainer.num_sanity_val_steps = 0
    if loop.max_epochs is None:  # the value that Lightning would set, without its warning
        loop.max_epochs = 1000 if is_unlimited(trainer) else -1
    try:
        yield
    finally:
        loop.min_epochs, loop.max_epochs, trainer.num_sanity_val_steps = kept


def stop_now(trainer: Trainer) -> None:
    """Ends a fit after the current batch, also before ``min_steps`` or ``min_epochs``."""
    trainer.fit_loop.min_epochs = None
    trainer.fit_loop.epoch_loop.min_steps = None
    trainer.should_stop = True


def is_at_end(trainer: Trainer) -> bool:
    """Returns whether a validation is the last one before a limit of updates or epochs."""
    epochs = trainer.max_epochs
    if 0 <= trainer.max_steps <= trainer.global_step:
        return True
    is_last = epochs is not None and 0 <= epochs <= trainer.current_epoch + 1
    return is_last and is_last_batch(trainer)


def set_max_steps(trainer: Trainer, max_steps: int) -> None:
    """Sets the limit of updates of a Trainer that has not been used."""
    trainer.fit_loop.epoch_loop.max_steps = max_steps


def is_out_of_memory(trainer: Trainer, error: BaseException) -> bool:
    """Returns whether an error says that the memory of a device or of the machine ran out."""
    says_so = own(trainer, "utilities.memory.is_oom_error")
    return isinstance(error, torch.OutOfMemoryError) or bool(says_so(error))


def silent_loggers(trainer: Trainer) -> list[Logger]:
    """Returns as many loggers as the Trainer has, which write nothing."""
    silent = own(trainer, "loggers.logger.DummyLogger")
    return [silent() for _ in trainer.loggers]
