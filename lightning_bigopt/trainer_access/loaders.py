"""Training loaders: access, sizes, and a hook that runs before they are first iterated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.utils.data import BatchSampler

from lightning_bigopt.batching.exact_loader import GlobalBatchLoader
from lightning_bigopt.trainer_access.loop import epoch_batches, fetched_batches, ready_batches
from lightning_bigopt.trainer_access.packages import classes, own
from lightning_bigopt.trainer_access.strategies import data_parallel_size

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import Strategy

__all__ = [
    "consumed",
    "epoch_samples",
    "exact_loader",
    "last_batch_samples",
    "may_reload",
    "micro_batch_size",
    "restart_epoch",
    "source_loaders",
    "stateful",
    "stop_watching_loaders",
    "train_loaders",
    "train_source",
    "watch_loaders",
]

_PROCESS = "process_dataloader"


def train_loaders(trainer: Trainer) -> list[Any]:
    """Returns the training loaders as the fit loop iterates them; from ``on_train_start`` on."""
    return _flat(trainer, trainer.train_dataloader)


def stateful(trainer: Trainer) -> bool:
    """Returns whether every training loader has a state, which Lightning saves and restores."""
    kinds = classes("fabric.utilities.types._Stateful")
    return all(isinstance(loader, kinds) for loader in train_loaders(trainer))


def may_reload(trainer: Trainer) -> bool:
    """Returns whether later epochs may have other training loaders."""
    return bool(trainer.reload_dataloaders_every_n_epochs)  # type: ignore[attr-defined]


def exact_loader(trainer: Trainer) -> GlobalBatchLoader | None:
    """Returns the training loader if it is a :class:`GlobalBatchLoader`, else None.

    Raises:
        ValueError: If it is one of several loaders.
    """
    loaders = train_loaders(trainer)
    exact = next((loader for loader in loaders if isinstance(loader, GlobalBatchLoader)), None)
    if exact is not None and len(loaders) > 1:
        raise ValueError(
            f"a GlobalBatchLoader must be the only training loader, got {len(loaders)} loaders; "
            "combine their datasets into one"
        )
    return exact


def watch_loaders(trainer: Trainer, receive: Callable[[Any], None]) -> None:
    """Calls ``receive`` with every training loader before the loader is first iterated.

    Lightning creates the iterator, and may fetch a batch, before ``on_train_start``. Every loader
    passes the public method ``Strategy.process_dataloader`` before that; it is replaced on this
    strategy object until :func:`stop_watching_loaders`.

    Args:
        trainer: The Trainer, from ``on_fit_start`` on.
        receive: Function of a training loader.
    """
    vars(trainer.strategy)[_PROCESS] = partial(_process, trainer, trainer.strategy, receive)


def stop_watching_loaders(trainer: Trainer) -> None:
    """Undoes :func:`watch_loaders`."""
    vars(trainer.strategy).pop(_PROCESS, None)


def _process(
    trainer: Trainer, strategy: Strategy, receive: Callable[[Any], None], dataloader: Any
) -> Any:
    if trainer.training:  # Lightning passes validation loaders to this method too
        receive(dataloader)
    # Looked up on the class: on the instance this name is the replacement.
    return type(strategy).process_dataloader(strategy, dataloader)


def micro_batch_size(trainer: Trainer) -> int | None:
    """Returns the samples in a full batch of one process; None if the loader has no such size."""
    loaders = train_loaders(trainer)
    size = getattr(_batch_holder(loaders[0]), "batch_size", None) if len(loaders) == 1 else None
    return size if isinstance(size, int) else None


def last_batch_samples(trainer: Trainer) -> int | None:
    """Returns the samples in the last batch of an epoch of one process; None if unknown."""
    size, batches = micro_batch_size(trainer), epoch_batches(trainer)
    if size is None or batches is None:
        return None
    loader = train_loaders(trainer)[0]
    sampler = getattr(_batch_holder(loader), "sampler", None)
    if getattr(_batch_holder(loader), "drop_last", False):
        return size
    try:
        if batches < len(loader):  # limit_train_batches ends the epoch before a partial batch
            return size
        samples = len(sampler)  # type: ignore[arg-type]
    except TypeError:
        return None
    return samples - size * (batches - 1)


def epoch_samples(trainer: Trainer) -> int | None:
    """Returns the samples of an epoch over all processes; None if unknown."""
    size, last, batches = (
        micro_batch_size(trainer),
        last_batch_samples(trainer),
        epoch_batches(trainer),
    )
    if size is None or last is None or batches is None:
        return None
    return (size * (batches - 1) + last) * data_parallel_size(trainer)


def consumed(trainer: Trainer) -> tuple[int, int | None]:
    """Returns the batches and samples that a run without this package has consumed.

    Full batches are assumed. The samples are None if the loader has no ``batch_size``.
    """
    batches = fetched_batches(trainer, epoch_batches(trainer) or 0)
    each = micro_batch_size(trainer)
    return batches, None if each is None else batches * each * data_parallel_size(trainer)


def restart_epoch(trainer: Trainer) -> None:
    """Restarts the iteration of the training loaders in the current epoch, if there is one.

    Lightning creates one iterator for each epoch, which does not follow a restored loader.
    """
    epochs: Any = trainer.fit_loop.epoch_progress.current
    if epochs.started == epochs.processed:
        return
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None  # while fitting
    iter(fetcher)
    fetcher.fetched += ready_batches(trainer)  # as Lightning does on a resume


def train_source(trainer: Trainer) -> Any:
    """Returns the source of the training loaders: a module, a datamodule, or the loaders."""
    return trainer.fit_loop._data_source.instance


def source_loaders(trainer: Trainer) -> list[Any]:
    """Returns the training loaders as their source makes them, before Lightning changes them."""
    return _flat(trainer, trainer.fit_loop._data_source.dataloader())


def _flat(trainer: Trainer, loaders: Any) -> list[Any]:
    if loaders is None:
        return []
    if not isinstance(loaders, classes("utilities.CombinedLoader")):
        loaders = own(trainer, "utilities.CombinedLoader")(loaders)
    return list(loaders.flattened)


def _batch_holder(loader: Any) -> Any:
    """Returns the object with ``batch_size`` and ``sampler``: the loader or its BatchSampler."""
    # A DataLoader with batch_sampler= has batch_size None. Subclasses of BatchSampler may change
    # the size of each batch, so that their attribute is not trusted.
    batches = getattr(loader, "batch_sampler", None)
    return batches if type(batches) is BatchSampler else loader
