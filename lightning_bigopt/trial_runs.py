"""Training beside a Trainer's own loop; like trainer_access a reader of Trainer internals."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import _TunerExitException as ExitFit

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["ExitFit", "fit_quietly", "run_beside", "what_a_fit_changes"]


def run_beside(trainer: Trainer, *, callbacks: Sequence[Callback], max_steps: int) -> None:
    """Trains in a loop of its own on the Trainer's data, without validation, logger or scheduler.

    The Trainer's own loop is not touched, and the loaders are put back. What else a training
    changes (:func:`what_a_fit_changes`, the module, random states) is the caller's to restore.

    Args:
        trainer: From ``on_fit_start`` on.
        callbacks: The only ones that take part.
        max_steps: Updates to be made.
    """
    loop = _FitLoop(trainer, min_epochs=None, max_epochs=-1)
    loop.epoch_loop = _TrainingEpochLoop(trainer, min_steps=None, max_steps=max_steps)
    data = trainer.fit_loop._data_source.dataloader()
    trainer.fit_loop, loop._data_source = loop, _DataLoaderSource(data, "")
    trainer.callbacks = list(callbacks)  # type: ignore[attr-defined]  # set by a connector
    trainer.loggers = [DummyLogger() for _ in trainer.loggers]
    trainer.limit_val_batches = 0
    trainer.should_stop = False
    trainer.strategy.lr_scheduler_configs = []
    with _put_back(data):
        try:
            loop.run()
        finally:
            loop.teardown()


def what_a_fit_changes(trainer: Trainer) -> list[object]:
    """The objects, the module apart, whose attributes a training changes."""
    optimizers = [getattr(optimizer, "optimizer", optimizer) for optimizer in trainer.optimizers]
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
    """``trainer.fit`` with these callbacks only, and without the Trainer's loggers."""
    kept = trainer.callbacks, trainer.loggers  # type: ignore[attr-defined]
    trainer.callbacks = list(callbacks)  # type: ignore[attr-defined]
    trainer.loggers = [DummyLogger() for _ in trainer.loggers]
    try:
        trainer.fit(module, train_dataloaders, datamodule=datamodule)
    finally:
        trainer.callbacks, trainer.loggers = kept  # type: ignore[attr-defined]


@contextmanager
def _put_back(data: Any) -> Iterator[None]:
    """Gives loaders that say where they are, and generators, their place again."""
    loaders = list(CombinedLoader(data).flattened)
    samplers = [getattr(loader, "sampler", None) for loader in loaders]
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
