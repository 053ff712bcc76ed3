"""Checks of the data set of a GlobalBatchLoader."""

from __future__ import annotations

from torch.utils.data import DataLoader, IterableDataset

__all__ = ["check_dataset"]


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
