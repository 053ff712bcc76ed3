"""Datasets of Hugging Face that are split for two processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from datasets.distributed import split_dataset_by_node
from torchdata.stateful_dataloader import StatefulDataLoader

from tests.compatibility.test_loaders import BATCHES, resumed, stream, table, train

TWO: dict[str, Any] = {"strategy": "ddp", "devices": 2}
SPLIT: dict[str, Any] = {**TWO, "use_distributed_sampler": False}


class SizedLoader(StatefulDataLoader):
    """Has a number of batches in an epoch, so that Lightning fetches no batch ahead."""

    def __len__(self) -> int:
        return BATCHES // 2


def split(dataset: Any) -> Any:
    return split_dataset_by_node(dataset, int(os.environ["RANK"]), 2)


def shuffled() -> Any:
    return StatefulDataLoader(split(table()), batch_size=2, shuffle=True)


def streamed() -> Any:
    return SizedLoader(split(stream()), batch_size=2)


def run(make: Any, batches: int, path: Path, **options: Any) -> dict[str, Any]:
    """Returns the batches and learning rates of an uninterrupted and a resumed run."""
    straight, second, updates = resumed(make, batches, path, **SPLIT, **options)
    return {
        "straight": straight.batches,
        "resumed": second.batches,
        "lrs": straight.lrs,
        "resumed lrs": second.lrs,
        "updates": updates,
    }


def split_datasets(out: Path) -> dict[str, Any]:
    """Trains and resumes with a table and a stream, each split for the processes."""
    runs = {f"table, {at}": run(shuffled, at, out / f"table{at}") for at in (3, 6, 9)}
    runs["stream, 3"] = run(streamed, 3, out / "stream3", max_epochs=1)
    return {**runs, "with a sampler": train(shuffled(), **TWO, max_epochs=1).batches}
