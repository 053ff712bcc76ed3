"""How much data there is: rows of a batch, batches and samples of an epoch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import BatchSampler

from lightning_bigopt.trainer_access.loaders import train_loaders
from lightning_bigopt.trainer_access.strategies import data_parallel_size

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["count_rows", "epoch_batches", "epoch_samples", "last_batch_samples", "micro_batch_size"]


def micro_batch_size(trainer: Trainer) -> int | None:
    """Samples in a full batch of one process; None where the loader does not say."""
    loaders = train_loaders(trainer)
    size = getattr(_batching(loaders[0]), "batch_size", None) if len(loaders) == 1 else None
    return size if isinstance(size, int) else None


def _batching(loader: Any) -> Any:
    """What holds ``batch_size`` and ``sampler``: the loader, or torch's own BatchSampler."""
    batches = getattr(loader, "batch_sampler", None)
    return batches if type(batches) is BatchSampler else loader


def epoch_batches(trainer: Trainer) -> int | None:
    """Batches of one process in an epoch, limits included; None for a loader without length."""
    batches = trainer.num_training_batches
    return None if math.isinf(batches) else int(batches)


def last_batch_samples(trainer: Trainer) -> int | None:
    """Samples in an epoch's last batch of one process; None where the loader does not say."""
    size, batches = micro_batch_size(trainer), epoch_batches(trainer)
    if size is None or batches is None:
        return None
    loader = train_loaders(trainer)[0]
    sampler = getattr(_batching(loader), "sampler", None)
    if getattr(_batching(loader), "drop_last", False):
        return size
    try:
        if batches < len(loader):
            return size
        samples = len(sampler)  # type: ignore[arg-type]
    except TypeError:
        return None
    return samples - size * (batches - 1)


def epoch_samples(trainer: Trainer) -> int | None:
    """Samples of all processes in an epoch; None where the loader does not say."""
    size, last, batches = (
        micro_batch_size(trainer),
        last_batch_samples(trainer),
        epoch_batches(trainer),
    )
    if size is None or last is None or batches is None:
        return None
    return (size * (batches - 1) + last) * data_parallel_size(trainer)


def count_rows(batch: Any) -> int:
    """The first dimension of the first tensor in a batch.

    Raises:
        ValueError: If the batch holds no tensor with a dimension.
    """
    for leaf in (batch,) if isinstance(batch, Tensor) else _leaves(batch):
        if leaf.ndim:
            return int(leaf.shape[0])
    raise ValueError(
        f"samples must be given for batches without a tensor, got a {type(batch).__name__}; pass "
        "samples=a function of the batch"
    )


def _leaves(batch: Any) -> Iterable[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _leaves(value)
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        for value in batch:
            yield from _leaves(value)
