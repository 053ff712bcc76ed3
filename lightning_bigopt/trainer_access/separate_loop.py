"""Trains in a separate loop of the Trainer, between two batches of its own loop or before it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_bigopt.batching.exact_loader import GlobalBatchLoader
from lightning_bigopt.checks import shown
from lightning_bigopt.optimizers.names import unwrapped
from lightning_bigopt.trainer_access.packages import classes, own
from lightning_bigopt.trainer_access.trial_runs import silent_loggers

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["loaders_restored", "next_losses", "objects_changed_by_fit", "run_separate_loop"]

# The attributes of a DataLoader, and of torchdata's StatefulDataLoader.
_BEFORE_THE_FIRST_ITERATOR = {
    "_iterator": None,
    "next_iter_state": None,
    "_initial_iter_for_state_dict": False,
}


def run_separate_loop(
    trainer: Trainer, module: LightningModule, *, callbacks: Sequence[Callback], max_steps: int
) -> None:
    """Trains in a separate loop on the Trainer's data, without validation, loggers or schedulers.

    The loop iterates copies of the loaders, so that it can run between two batches of the Trainer's
    own fit loop; datasets and samplers are shared, and the loaders are restored. The caller must
    restore everything else that training changes: the module, :func:`objects_changed_by_fit` and
    the random states.

    Args:
        trainer: The Trainer, from ``on_fit_start`` on.
        module: The module to train.
        callbacks: The only callbacks that run; they are set up and torn down here.
        max_steps: Number of updates.

    Raises:
        ValueError: If a training loader can be iterated only once.
    """
    loop = own(trainer, "loops.fit_loop._FitLoop")(trainer, min_epochs=None, max_epochs=-1)
    epoch_loop = own(trainer, "loops.training_epoch_loop._TrainingEpochLoop")
    loop.epoch_loop = epoch_loop(trainer, min_steps=None, max_steps=max_steps)
    source = own(trainer, "trainer.connectors.data_connector._DataLoaderSource")
    # The loaders are made once, so that those that are restored are those that were iterated.
    data = trainer.fit_loop._data_source.dataloader()
    if not isinstance(data, classes("utilities.CombinedLoader")):
        data = own(trainer, "utilities.CombinedLoader")(data, "max_size_cycle")  # as the fit loop
    if any(hasattr(loader, "__next__") for loader in data.flattened):
        raise ValueError(
            f"the training loader must be iterable again for a trial run, got {shown(data)}, an "
            "iterator whose batches the run would lose; pass a DataLoader or a list of batches"
        )
    copies = copy.copy(data)
    copies.flattened = [_copied_loader(loader) for loader in data.flattened]
    trainer.fit_loop, loop._data_source = loop, source(copies, "")
    trainer.callbacks = list(callbacks)  # type: ignore[attr-defined]  # set by a connector
    trainer.loggers = silent_loggers(trainer)
    trainer.limit_val_batches = 0
    trainer.should_stop = False
    trainer.strategy.lr_scheduler_configs = []
    pairs = zip(data.flattened, copies.flattened, strict=True)
    shared = [loader for loader, copied in pairs if copied is loader]
    with loaders_restored(trainer, data, with_states_of=shared):
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


def next_losses(trainer: Trainer, module: LightningModule, count: int) -> Tensor:
    """Computes the losses of the next batches of the current loop, without gradients.

    The batches are taken from the loop's iterator: call this after the last batch of a loop. The
    module stays in training mode, and logs nothing.

    Args:
        trainer: The Trainer, in ``on_train_batch_end``.
        module: The module, with automatic optimization.
        count: Number of batches; the epoch begins again if it has fewer.

    Returns:
        The losses of this process, float32 of shape ``(count,)``.

    Raises:
        ValueError: If the epoch has no batch, or a loss is missing.
    """
    fetcher: Any = trainer.fit_loop._data_fetcher
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    losses, is_new = list[Tensor](), False
    vars(module).update(log=_ignore, log_dict=_ignore)
    try:
        while len(losses) < count:
            batch = next(fetcher, None)
            if batch is None and is_new:
                raise ValueError(
                    "the training loader must have a batch to evaluate, got none; use a loader "
                    "that can be iterated again"
                )
            is_new = batch is None
            if batch is None:
                iter(fetcher)
                continue
            data = trainer.precision_plugin.convert_input(batch[0])
            data = module._on_before_batch_transfer(data, dataloader_idx=0)
            data = trainer.strategy.batch_to_device(data, dataloader_idx=0)
            arguments = (data, len(losses)) if takes_index else (data,)
            with torch.no_grad():
                output: Any = trainer.strategy.training_step(*arguments)
            loss = output.get("loss") if isinstance(output, dict) else output
            if loss is None:
                raise ValueError(
                    "training_step must return the loss of every batch for a trial run, got "
                    f"{output!r}; return it"
                )
            losses.append(loss.detach().float())
    finally:
        for name in ("log", "log_dict"):
            vars(module).pop(name, None)
    return torch.stack(losses)


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``LightningModule.log`` and ``log_dict``."""


def _copied_loader(loader: Any) -> Any:
    """Returns a copy of a loader that has no iterator yet; loaders of unknown classes are shared.

    A loader with persistent workers has a single iterator, which a second ``iter()`` restarts, and
    a stateful loader saves the state of the last one.
    """
    if not isinstance(loader, DataLoader | GlobalBatchLoader):
        return loader
    copied = copy.copy(loader)
    for name, value in _BEFORE_THE_FIRST_ITERATOR.items():
        if name in vars(copied):
            vars(copied)[name] = value
    return copied


@contextmanager
def loaders_restored(
    trainer: Trainer, data: Any, *, with_states_of: Sequence[Any] | None = None
) -> Iterator[None]:
    """Restores the states of stateful loaders and of the generators of loaders and samplers.

    Args:
        trainer: The Trainer.
        data: The loaders, in any structure that the Trainer accepts.
        with_states_of: The loaders whose states are restored; None for all. A StatefulDataLoader
            that is restored while it is iterated does not save its position any more.
    """
    is_combined = isinstance(data, classes("utilities.CombinedLoader"))
    combined = data if is_combined else own(trainer, "utilities.CombinedLoader")(data)
    loaders = list(combined.flattened)
    samplers = [getattr(loader, "sampler", None) for loader in loaders]
    # By id: a loader and its sampler often share one generator.
    generators = {
        id(generator): (generator, generator.get_state())
        for holder in (*loaders, *samplers)
        if (generator := getattr(holder, "generator", None)) is not None
    }
    states = [
        (loader, copy.deepcopy(loader.state_dict()))
        for loader in (loaders if with_states_of is None else with_states_of)
        if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
    ]
    try:
        yield
    finally:
        for generator, state in generators.values():
            generator.set_state(state)
        for loader, state in states:
            loader.load_state_dict(state)
