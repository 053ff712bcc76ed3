"""Checks of the arguments of a GlobalBatchLoader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

__all__ = ["check_dataset", "check_options"]

_RESERVED_OPTIONS = (
    "batch_sampler",
    "batch_size",
    "collate_fn",
    "dataset",
    "drop_last",
    "generator",
    "num_workers",
    "persistent_workers",
    "sampler",
    "shuffle",
)


def check_dataset(dataset: object) -> None:
    """Raises unless a data set has a length and an index.

    Raises:
        ValueError: If it is a DataLoader, an IterableDataset, has no length, or is empty.
    """
    if isinstance(dataset, DataLoader):
        raise ValueError(
            "dataset must be a Dataset, got a DataLoader; write GlobalBatchLoader(loader.dataset, "
            "micro_batch_size=...)"
        )
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            "dataset must have a length and an index with GlobalBatchLoader, got "
            f"{type(dataset).__name__}; use a DataLoader, which BatchSizeScheduler supports"
        )
    if not len(dataset):
        raise ValueError("dataset must not be empty, got a length of 0; check its files")


def check_options(options: Mapping[str, Any]) -> None:
    """Raises for arguments of the inner DataLoader that the loader sets itself.

    Raises:
        ValueError: If there is one.
    """
    reserved = sorted(set(options).intersection(_RESERVED_OPTIONS))
    if reserved:
        raise ValueError(
            f"options must not contain {', '.join(reserved)}, got {dict(options)!r}; "
            "remove them, because GlobalBatchLoader sets them itself"
        )
