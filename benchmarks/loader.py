"""Compares the throughput of GlobalBatchLoader with torch's DataLoader at the same batch size.

Each trial is one epoch. The loaders take turns, so that other work on the machine affects all of
them alike; results are medians. ``--write`` regenerates docs/benchmarks/loader.md.
``--busy`` measures processor time instead of elapsed time, for a machine that does other work.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_bigopt.batching import (
    BatchSizeRamp,
    GlobalBatchLoader,
    planned_sizes,
)
from lightning_bigopt.durations import Progress

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "loader.md"
MICRO = 32


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Inputs and targets of a language model: overlapping pieces of one long text."""

    def __init__(self, samples: int, *, length: int = 256) -> None:
        self.samples, self.length = samples, length
        self.text = torch.randint(256, (samples + length + 1,))

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        piece = self.text[index : index + self.length + 1]
        return piece[:-1], piece[1:]


def datasets(samples: int) -> dict[str, Dataset[Any]]:
    """Returns the datasets by name, from the cheapest to the most expensive sample."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(samples, 64, generator=generator)
    return {
        "vectors of 64 (`TensorDataset`)": TensorDataset(vectors, vectors[:, 0]),
        "pieces of 256 tokens": Windows(samples),
    }


def ramp(loader: GlobalBatchLoader) -> GlobalBatchLoader:
    """Sets batch sizes that grow sixteenfold over the epoch, and returns the loader."""
    policy = BatchSizeRamp(start=MICRO, end=16 * MICRO, over="90%", increment=MICRO)
    loader.set_batch_sizes(
        lambda: planned_sizes(
            policy,
            start=Progress(fraction=0.0),
            position=0,
            clock="samples",
            budget=loader.samples,
            micro_batch_size=MICRO,
            world_size=1,
            samples_per_epoch=loader.samples,
        )
    )
    return loader


def variants(dataset: Dataset[Any], workers: int) -> dict[str, Iterable[Any]]:
    """Returns the loaders by name, all with micro-batches of the same size."""

    def exact(**options: Any) -> GlobalBatchLoader:
        return GlobalBatchLoader(dataset, micro_batch_size=MICRO, num_workers=workers, **options)

    def torch_loader() -> DataLoader[Any]:
        return DataLoader(dataset, batch_size=MICRO, shuffle=True, num_workers=workers)

    return {
        "torch": torch_loader(),
        "torch again": torch_loader(),
        "constant": exact(),
        "ramp": ramp(exact()),
        "sample streams": exact(randomness="sample"),
    }


def processor_time() -> float:
    """Returns the processor time of this process and of its finished workers."""
    found = os.times()
    return time.process_time() + found.children_user + found.children_system


def samples_per_second(loader: Iterable[Any], samples: int, clock: Callable[[], float]) -> float:
    """Measures one epoch, including the start and end of the workers."""
    start, seen = clock(), 0
    for batch in loader:
        seen += len(batch[0])
    assert seen == samples
    return seen / (clock() - start)


def measure(
    epochs: int, clock: Callable[[], float]
) -> list[tuple[str, int, dict[str, float], dict[str, float]]]:
    """Returns dataset, workers, the median of each loader, and its median ratio to torch."""
    rows = []
    # Short epochs, so that all loaders run under the same conditions; longer ones with workers,
    # whose start would otherwise dominate.
    for workers, samples, trials in ((0, 4_096, 3 * epochs), (2, 24_576, epochs)):
        for name, dataset in datasets(samples).items():
            loaders = variants(dataset, workers)
            speeds: dict[str, list[float]] = {kind: [] for kind in loaders}
            for trial in range(trials + 1):
                order = list(loaders) if trial % 2 else list(loaders)[::-1]
                found = {kind: samples_per_second(loaders[kind], samples, clock) for kind in order}
                if trial:  # the first one warms up
                    for kind, speed in found.items():
                        speeds[kind].append(speed)
            medians = {kind: median(found) for kind, found in speeds.items()}
            ratios = {
                kind: median(
                    [one / reference for one, reference in zip(found, speeds["torch"], strict=True)]
                )
                for kind, found in speeds.items()
            }
            rows.append((name, workers, medians, ratios))
    return rows


def table(rows: list[tuple[str, int, dict[str, float], dict[str, float]]]) -> str:
    """Formats the rows in Markdown."""
    heads = ("dataset", "workers", "torch, samples/s", "torch again", "constant batch", "ramp")
    lines = [
        f"| {' | '.join(heads)} | `randomness='sample'` |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, workers, medians, ratios in rows:
        cells = " | ".join(f"{ratios[kind]:.2f} ×" for kind in list(medians)[1:])
        lines.append(f"| {name} | {workers} | {medians['torch']:,.0f} | {cells} |")
    return "\n".join(lines)


def page(body: str, epochs: int, *, busy: bool) -> str:
    """Returns the page with the table."""
    seconds = (
        "Seconds are processor time including workers, because the machine did other work"
        if busy
        else "Seconds are elapsed time"
    )
    return f"""# Speed of GlobalBatchLoader

`GlobalBatchLoader` can change the batch at any update and resume at any sample. This page
compares its speed with torch's `DataLoader`. Each trial is one epoch in micro-batches of {MICRO}:
4,096 samples and {3 * epochs} trials without workers, 24,576 samples and {epochs} trials with two
workers, including their start. The ratios are medians of (samples per second) / (samples per
second of `DataLoader(batch_size={MICRO}, shuffle=True)` in the same trial). The loaders take
turns. *torch again* is a second torch loader; it shows how precise the ratios are. {seconds}.

{body}

*Constant batch* and *ramp* (the global batch grows from {MICRO} to {16 * MICRO} during the epoch)
are about as fast as torch's loader, because they use the same inner `DataLoader`.
`randomness="sample"` seeds three generators before every sample. This makes augmentation the same
on any number of processes. Its cost is visible if loading a sample costs almost nothing.

Measured with Python {platform.python_version()} and torch {torch.__version__} on {os.cpu_count()}
cores ({platform.machine()}). Regenerate this page with `python benchmarks/loader.py --write`.
"""


def main() -> None:
    """Prints the table, and writes the page on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--epochs", type=int, default=15, help="trials with workers; three times as many without"
    )
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--busy", action="store_true", help="processor time: for a busy machine")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clock = processor_time if arguments.busy else time.perf_counter
    body = table(measure(arguments.epochs, clock))
    print(body)
    if arguments.write:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(page(body, arguments.epochs, busy=arguments.busy), encoding="utf-8")


if __name__ == "__main__":
    main()
