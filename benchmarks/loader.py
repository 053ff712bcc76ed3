"""Throughput of GlobalBatchLoader beside torch's DataLoader with the same batch.

One epoch a trial, the loaders in turn (so that a busy machine slows all of them alike), medians.
``python benchmarks/loader.py --write`` renews docs/benchmarks/loader.md; ``--busy`` counts the
processor's seconds instead of the wall's, for a machine that does other work at the same time.
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
    """By name, from the cheapest to the dearest sample."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(samples, 64, generator=generator)
    return {
        "vectors of 64 (`TensorDataset`)": TensorDataset(vectors, vectors[:, 0]),
        "pieces of 256 tokens": Windows(samples),
    }


def ramp(loader: GlobalBatchLoader) -> GlobalBatchLoader:
    """The same loader with a batch that grows sixteenfold over the epoch."""
    policy = BatchSizeRamp(start=MICRO, end=16 * MICRO, over="90%", increment=MICRO)
    loader.plan(
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


def contenders(dataset: Dataset[Any], workers: int) -> dict[str, Iterable[Any]]:
    """By name, all with micro-batches of the same size."""

    def ours(**options: Any) -> GlobalBatchLoader:
        return GlobalBatchLoader(dataset, micro_batch_size=MICRO, num_workers=workers, **options)

    def theirs() -> DataLoader[Any]:
        return DataLoader(dataset, batch_size=MICRO, shuffle=True, num_workers=workers)

    return {
        "torch": theirs(),
        "torch again": theirs(),
        "constant": ours(),
        "ramp": ramp(ours()),
        "sample streams": ours(randomness="sample"),
    }


def processor_time() -> float:
    """Seconds of this process and of the workers that it has waited for."""
    found = os.times()
    return time.process_time() + found.children_user + found.children_system


def samples_per_second(loader: Iterable[Any], samples: int, clock: Callable[[], float]) -> float:
    """One epoch, the start of workers and their end included."""
    start, seen = clock(), 0
    for batch in loader:
        seen += len(batch[0])
    assert seen == samples
    return seen / (clock() - start)


def measure(
    epochs: int, clock: Callable[[], float]
) -> list[tuple[str, int, dict[str, float], dict[str, float]]]:
    """Rows: dataset, workers, each loader's median, and its median ratio to torch."""
    rows = []
    # Short epochs in quick turns see the same machine; with workers, their start must not rule.
    for workers, samples, trials in ((0, 4_096, 3 * epochs), (2, 24_576, epochs)):
        for name, dataset in datasets(samples).items():
            loaders = contenders(dataset, workers)
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
                    [mine / theirs for mine, theirs in zip(found, speeds["torch"], strict=True)]
                )
                for kind, found in speeds.items()
            }
            rows.append((name, workers, medians, ratios))
    return rows


def table(rows: list[tuple[str, int, dict[str, float], dict[str, float]]]) -> str:
    """The rows in Markdown."""
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
    """The page that holds the table."""
    seconds = (
        "A second is one of processor time, workers included: the machine did other work too"
        if busy
        else "A second is one on the wall"
    )
    return f"""# The exact loader beside torch's

What does it cost that `GlobalBatchLoader` may change the batch at any update and resumes at any
sample? One epoch a trial in micro-batches of {MICRO}: 4,096 samples and {3 * epochs} trials
without workers, 24,576 samples and {epochs} trials with two, their start included. The ratios are
medians of (samples a second) / (those of `DataLoader(batch_size={MICRO}, shuffle=True)` in the same
trial). The loaders take turns, and *torch again*, a second loader of torch's, shows how far the
ratios can be trusted. {seconds}.

{body}

*Constant batch* and *ramp* (the global batch grows from {MICRO} to {16 * MICRO} in mid-epoch) cost
what torch's loader costs: they build the same inner `DataLoader`. `randomness="sample"` seeds
three generators before every sample, which shows where a sample costs next to nothing, and is the
price of augmentation that is the same on any number of processes.

Measured with Python {platform.python_version()} and torch {torch.__version__} on {os.cpu_count()}
cores ({platform.machine()}). Renew this page with `python benchmarks/loader.py --write`.
"""


def main() -> None:
    """Prints the table, and writes the page on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--epochs", type=int, default=15, help="trials with workers; thrice as many without"
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
