"""Trains in a separate loop of the Trainer, between two batches of its own loop or before it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_bigopt.batching.exact_loader import GlobalBatchLoader
from lightning_bigopt.checks import shown
from lightning_bigopt.optimizers.names import unwrapped
from lightning_bigopt.optimizers.object_snapshot import ObjectSnapshot
from lightning_bigopt.trainer_access.loaders import exact_loader
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

# The attributes of torch's samplers that refer to the data, which would be copied.
_DATA_OF_SAMPLERS = ("data_source", "dataset")


def run_separate_loop(
    trainer: Trainer,
    module: LightningModule,
    *,
    callbacks: Sequence[Callback],
    max_steps: int,
    whole_windows: int = 1,
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
        whole_windows: Number of batches of which an epoch has a multiple, so that the accumulation
            windows of different batch sizes end together; for loaders with a length.

    Raises:
        ValueError: If a training loader can be iterated only once, or an epoch is too short.
    """
    loop = own(trainer, "loops.fit_loop._FitLoop")(trainer, min_epochs=None, max_epochs=-1)
    epoch_loop = own(trainer, "loops.training_epoch_loop._TrainingEpochLoop")
    loop.epoch_loop = epoch_loop(trainer, min_steps=None, max_steps=max_steps)
    source = own(trainer, "trainer.connectors.data_connector._DataLoaderSource")
    # The loaders are made once, so that those that are restored are those that were iterated.
    data = trainer.fit_loop._data_source.dataloader()
    if not isinstance(data, classes("utilities.CombinedLoader")):
        data = own(trainer, "utilities.CombinedLoader")(data, "max_size_cycle")  # as the fit loop
    sources = [source for loader in data.flattened for source in (loader, _dataset(loader))]
    if any(hasattr(source, "__next__") for source in sources):
        raise ValueError(
            "the training loader must be iterable again for a trial run, got an iterator in "
            f"{shown(data.flattened)}, whose batches the run would lose; pass a DataLoader of a "
            "dataset that is not its own iterator, or a list of batches"
        )
    copies = copy.copy(data)
    copies.flattened = [_copied_loader(loader) for loader in data.flattened]
    trainer.fit_loop, loop._data_source = loop, source(copies, "")
    trainer.callbacks = list(callbacks)  # type: ignore[attr-defined]  # set by a connector
    trainer.loggers = silent_loggers(trainer)
    trainer.limit_val_batches = 0
    if whole_windows > 1:
        _limit_epoch(trainer, copies, whole_windows)
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


def _limit_epoch(trainer: Trainer, data: Any, windows: int) -> None:
    """Limits an epoch to a multiple of a number of batches."""
    if any(isinstance(loader, GlobalBatchLoader) for loader in data.flattened):
        return  # it plans its windows itself
    lengths = [length for loader in data.flattened if (length := sized_len(loader)) is not None]
    if len(lengths) < len(data.flattened):
        return
    length, limit = max(lengths), trainer.limit_train_batches  # "max_size_cycle"
    length = min(length, limit) if isinstance(limit, int) else int(length * limit)
    if length < windows:
        raise ValueError(
            f"an epoch must have at least {windows} batches of each process for the largest batch "
            f"of a trial run, got {length}; try smaller batches, or train on more data"
        )
    trainer.limit_train_batches = length // windows * windows


def _dataset(loader: Any) -> Any:
    return getattr(loader, "dataset", None)


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
        count: Largest number of batches; the epoch begins again, and each batch is used once. With
            a GlobalBatchLoader they have its micro-batch size.

    Returns:
        The losses of this process, float32 of shape ``(count,)``, or shorter. Batches for which
        ``training_step`` returns no loss are left out.
    """
    fetcher: Any = trainer.fit_loop._data_fetcher
    exact = exact_loader(trainer)
    if exact is not None:  # its micro-batches depend on the sizes of the updates
        exact.set_batch_sizes(None)
        iter(fetcher)
    if fetcher.length is not None:
        count = min(count, fetcher.length)
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    losses, begins = list[Tensor](), 0
    vars(module).update(log=_ignore, log_dict=_ignore)
    try:
        while len(losses) < count:
            batch = next(fetcher, None)
            if batch is None:
                begins += 1
                if begins > 1:
                    break
                iter(fetcher)
                continue
            data = trainer.precision_plugin.convert_input(batch[0])
            data = module._on_before_batch_transfer(data, dataloader_idx=0)
            data = trainer.strategy.batch_to_device(data, dataloader_idx=0)
            arguments = (data, len(losses)) if takes_index else (data,)
            with torch.no_grad():
                output: Any = trainer.strategy.training_step(*arguments)
            loss = output.get("loss") if isinstance(output, dict) else output
            if loss is not None:
                losses.append(loss.detach().float())
    finally:
        for name in ("log", "log_dict"):
            vars(module).pop(name, None)
    return torch.stack(losses) if losses else torch.empty(0, device=module.device)


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
    if isinstance(copied, GlobalBatchLoader):
        copied.position = copied.batches = 0
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
    samplers = [sampler for loader in loaders for sampler in _samplers(loader)]
    generators = [getattr(loader, "generator", None) for loader in loaders]
    snapshot = ObjectSnapshot(
        [generator for generator in generators if generator is not None],
        *samplers,
        ignore=lambda name: name in _DATA_OF_SAMPLERS,
    )
    states = [
        (loader, copy.deepcopy(loader.state_dict()))
        for loader in (loaders if with_states_of is None else with_states_of)
        if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
    ]
    try:
        yield
    finally:
        snapshot.restore()
        for loader, state in states:
            loader.load_state_dict(state)


def _samplers(loader: Any) -> Iterator[Any]:
    """Yields the samplers of a loader, also those within a batch sampler."""
    for name in ("sampler", "batch_sampler"):
        sampler = getattr(loader, name, None)
        if hasattr(sampler, "__dict__"):
            yield sampler
            yield from _samplers(sampler)
