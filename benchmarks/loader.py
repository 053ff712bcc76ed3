"""Throughput of GlobalBatchLoader beside torch's DataLoader with the same batch.

One epoch a trial, the loaders in turn (so that a busy machine slows all of them alike), medians.
``python benchmarks/loader.py --write`` renews docs/benchmarks/loader.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Iterable
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


def datasets() -> dict[str, Dataset[Any]]:
    """By name, from the cheapest to the dearest sample."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(12_288, 64, generator=generator)
    return {
        "vectors of 64 (`TensorDataset`)": TensorDataset(vectors, vectors[:, 0]),
        "pieces of 256 tokens": Windows(12_288),
    }


def ramp(loader: GlobalBatchLoader) -> GlobalBatchLoader:
    """The same loader with a batch that grows sixteenfold over the epoch."""
    policy = BatchSizeRamp(start=MICRO, end=16 * MICRO, over="90%")
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

    return {
        "torch": DataLoader(dataset, batch_size=MICRO, shuffle=True, num_workers=workers),
        "constant": ours(),
        "ramp": ramp(ours()),
        "sample streams": ours(randomness="sample"),
    }


def samples_per_second(loader: Iterable[Any], samples: int) -> float:
    """One epoch, the start of workers included."""
    start, seen = time.perf_counter(), 0
    for batch in loader:
        seen += len(batch[0])
    assert seen == samples
    return seen / (time.perf_counter() - start)


def measure(trials: int) -> list[tuple[str, int, dict[str, float], dict[str, float]]]:
    """Rows: dataset, workers, each loader's median, and its median ratio to torch."""
    rows = []
    for name, dataset in datasets().items():
        for workers in (0, 2):
            loaders = contenders(dataset, workers)
            speeds: dict[str, list[float]] = {kind: [] for kind in loaders}
            for trial in range(trials + 1):
                # Alternate who goes first; the first trial warms up.
                order = list(loaders) if trial % 2 else list(loaders)[::-1]
                found = {
                    k: samples_per_second(loaders[k], len(dataset))  # type: ignore[arg-type]
                    for k in order
                }
                if trial:
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
    lines = [
        '| dataset | workers | torch, samples/s | constant batch | ramp | `randomness="sample"` |',
        "|---|---|---|---|---|---|",
    ]
    for name, workers, medians, ratios in rows:
        cells = " | ".join(f"{ratios[kind]:.2f} ×" for kind in list(medians)[1:])
        lines.append(f"| {name} | {workers} | {medians['torch']:,.0f} | {cells} |")
    return "\n".join(lines)


def page(body: str, trials: int) -> str:
    """The page that holds the table."""
    return f"""# The exact loader beside torch's

What does it cost that `GlobalBatchLoader` may change the batch at any update and resumes at any
sample? One epoch of 12,288 samples in micro-batches of {MICRO}, the start of workers included; the
ratios are medians over {trials} trials of (samples a second) / (those of
`DataLoader(batch_size={MICRO}, shuffle=True)` in the same trial). The loaders take turns.

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
    parser.add_argument("--trials", type=int, default=21, help="odd; medians are taken")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    arguments = parser.parse_args()
    body = table(measure(arguments.trials))
    print(body)
    if arguments.write:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(page(body, arguments.trials), encoding="utf-8")


if __name__ == "__main__":
    main()
