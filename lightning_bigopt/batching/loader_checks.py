"""Checks of the arguments of a GlobalBatchLoader."""

from __future__ import annotations

from collections.abc import Mapping

from torch.utils.data import DataLoader, IterableDataset

from lightning_bigopt.checks import check_between, shown
from lightning_bigopt.type_checks import check_callable, check_instance

__all__ = ["check_dataset", "check_loader_options"]

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
    is_indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not is_indexed or isinstance(
        dataset, (IterableDataset, Mapping, str, bytes, bytearray, type)
    ):
        raise ValueError(
            f"dataset must have a length and an index with GlobalBatchLoader, got "
            f"{shown(dataset)}; use a DataLoader, which BatchSizeScheduler supports"
        )
    try:
        length = len(dataset)  # type: ignore[arg-type]
    except (OverflowError, TypeError):
        length = None
    if not length:
        raise ValueError(f"dataset must not be empty, got {shown(dataset)}; check its files")


def check_loader_options(
    *, seed: object, collate_fn: object, options: Mapping[str, object] | None
) -> None:
    """Raises unless the other arguments of a GlobalBatchLoader are valid.

    Raises:
        ValueError: If the seed is not an int of 64 bits, ``collate_fn`` is not a function,
            or ``options`` is no dict or has an option that the loader sets itself.
    """
    check_instance("seed", seed, int, hint="write 0")
    check_between("seed", seed, -(2**64), 2**64, hint="write 0")  # those of torch are below 2**64
    if collate_fn is not None:
        check_callable("collate_fn", collate_fn, hint="None is the function of torch")
    if options is None:
        return
    check_instance("options", options, Mapping, hint="write {'pin_memory': True}")
    for name in options:
        check_instance("options", name, str, hint="write the names of arguments of DataLoader")
    if reserved := sorted(set(options).intersection(_RESERVED_OPTIONS)):
        raise ValueError(
            f"options must not contain {', '.join(reserved)}, got {shown(options)}; remove them, "
            "because GlobalBatchLoader sets them itself"
        )
