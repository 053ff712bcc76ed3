"""Trial runs: training in a separate fit loop, or in a fit with other callbacks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lightning_bigopt.optimizers.names import unwrapped
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
    "loaders_restored",
    "objects_changed_by_fit",
    "run_separate_loop",
    "set_max_steps",
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


def run_separate_loop(
    trainer: Trainer, module: LightningModule, *, callbacks: Sequence[Callback], max_steps: int
) -> None:
    """Trains in a separate loop on the Trainer's data, without validation, loggers or schedulers.

    The Trainer's own fit loop is not changed, and the loaders are restored. The caller must restore
    everything else that training changes: the module, :func:`objects_changed_by_fit` and the random
    states.

    Args:
        trainer: The Trainer, from ``on_fit_start`` on.
        module: The module to train.
        callbacks: The only callbacks that run; they are set up and torn down here.
        max_steps: Number of updates.
    """
    loop = own(trainer, "loops.fit_loop._FitLoop")(trainer, min_epochs=None, max_epochs=-1)
    epoch_loop = own(trainer, "loops.training_epoch_loop._TrainingEpochLoop")
    loop.epoch_loop = epoch_loop(trainer, min_steps=None, max_steps=max_steps)
    source = own(trainer, "trainer.connectors.data_connector._DataLoaderSource")
    # The loaders are made once, so that those that are restored are those that were iterated.
    data = trainer.fit_loop._data_source.dataloader()
    trainer.fit_loop, loop._data_source = loop, source(data, "")
    trainer.callbacks = list(callbacks)  # type: ignore[attr-defined]  # set by a connector
    trainer.loggers = silent_loggers(trainer)
    trainer.limit_val_batches = 0
    trainer.should_stop = False
    trainer.strategy.lr_scheduler_configs = []
    with loaders_restored(trainer, data):
        try:
            for callback in callbacks:
                callback.setup(trainer, module, "fit")
            for callback in callbacks:
                callback.on_fit_start(trainer, module)
            loop.run()
        finally:
            loop.teardown()
            for callback in callbacks:
                callback.teardown(trainer, module, "fit")


def objects_changed_by_fit(trainer: Trainer) -> list[object]:
    """Returns the objects, other than the module, whose attributes training changes."""
    optimizers = [unwrapped(optimizer) for optimizer in trainer.optimizers]
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scalers = [] if scaler is None else [scaler]
    return [trainer, trainer.strategy, trainer._logger_connector, *optimizers, *scalers]


def fit_quietly(
    trainer: Trainer,
    module: LightningModule,
    train_dataloaders: Any,
    *,
    datamodule: Any,
    callbacks: Sequence[Callback],
) -> None:
    """Runs ``trainer.fit`` with other callbacks, and without loggers and Lightning's advice.

    Args:
        trainer: The Trainer; its callbacks and loggers are restored.
        module: As for ``Trainer.fit``.
        train_dataloaders: As for ``Trainer.fit``.
        datamodule: As for ``Trainer.fit``.
        callbacks: The callbacks that replace the Trainer's.
    """
    saved = trainer.callbacks, trainer.loggers  # type: ignore[attr-defined]
    trainer.callbacks = list(callbacks)  # type: ignore[attr-defined]
    # Not an empty list: a module may call self.logger.log_metrics.
    trainer.loggers = silent_loggers(trainer)
    try:
        with warnings.catch_warnings():
            advice = own(trainer, "fabric.utilities.warnings.PossibleUserWarning")
            warnings.simplefilter("ignore", advice)  # the user's own fit repeats it
            trainer.fit(module, train_dataloaders, datamodule=datamodule)
    finally:
        trainer.callbacks, trainer.loggers = saved  # type: ignore[attr-defined]


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


@contextmanager
def loaders_restored(trainer: Trainer, data: Any) -> Iterator[None]:
    """Restores the states of stateful loaders and of the generators of loaders and samplers."""
    loaders = list(own(trainer, "utilities.CombinedLoader")(data).flattened)
    samplers = [getattr(loader, "sampler", None) for loader in loaders]
    # By id: a loader and its sampler often share one generator.
    generators = {
        id(generator): (generator, generator.get_state())
        for holder in (*loaders, *samplers)
        if (generator := getattr(holder, "generator", None)) is not None
    }
    states = [
        (loader, copy.deepcopy(loader.state_dict()))
        for loader in loaders
        if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
    ]
    try:
        yield
    finally:
        for generator, state in generators.values():
            generator.set_state(state)
        for loader, state in states:
            loader.load_state_dict(state)
