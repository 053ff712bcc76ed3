"""Trains for many steps, and samples memory, objects, open files and the sizes of files."""

from __future__ import annotations

import gc
import itertools
import os
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    GradientClipping,
    LearningRateScheduler,
    NormClip,
    OptimizationMonitor,
    WarmupStableDecay,
)
from tests.helpers import QUIET

LOG_EVERY = 50
MEGABYTE = 1e6
# Of Student's t with 18 degrees of freedom, for the 95 % interval of a slope through 20 samples.
QUANTILE = 2.1

INTRODUCTION = """\
{updates:,} updates of a network with two layers and the callbacks of the README, with a
TensorBoardLogger (`log_every_n_steps=50`). After a warm-up of {first:,} updates a sample is taken
and a checkpoint is written every {every:,} updates. The size of a checkpoint varies, because
GradientClipping keeps up to 512 norms for its summary, and drops every second one when they are
full. The objects of the types Counter and Sample are the samples themselves.
"""


@dataclass(frozen=True)
class Sample:
    """What a process uses after a number of steps.

    Args:
        step: Number of updates.
        memory: Resident memory in bytes.
        objects: Number of objects that Python's garbage collector tracks, by type.
        open_files: Number of open file descriptors.
        checkpoint: Size of the newest checkpoint in bytes; 0 without one.
        events: Size of TensorBoard's files in bytes.
    """

    step: int
    memory: int
    objects: Counter[str]
    open_files: int
    checkpoint: int
    events: int


class TinyModule(L.LightningModule):
    """Two linear layers; logs its loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss


class TakesSamples(L.Callback):
    """Takes a sample after every ``every`` updates, when they have been logged and saved."""

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self.samples: list[Sample] = []
        self.last = 0

    def on_train_start(self, *args: Any) -> None:
        self.take(0)  # the first sample creates objects that stay
        self.samples.clear()

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        step = trainer.global_step
        if step > self.last and step % self.every == 0:
            self.last = step
            self.take(step)

    def on_train_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step > self.last:
            self.take(trainer.global_step)

    def take(self, step: int) -> None:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        checkpoints = sorted(self.folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        events = self.folder.rglob("events.out.tfevents.*")
        self.samples.append(
            Sample(
                step=step,
                memory=pages * os.sysconf("SC_PAGE_SIZE"),
                objects=Counter(type(found).__name__ for found in gc.get_objects()),
                open_files=len(os.listdir("/proc/self/fd")),  # noqa: PTH208  # one object less
                checkpoint=checkpoints[-1].stat().st_size if checkpoints else 0,
                events=sum(path.stat().st_size for path in events),
            )
        )


def long_run(folder: Path, *, steps: int, every: int) -> list[Sample]:
    """Trains with the callbacks of the README, and returns a sample every ``every`` steps."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(*(torch.randn(4000, n, generator=generator) for n in (4, 3)))
    takes = TakesSamples(folder, every)
    callbacks = [
        LearningRateScheduler(WarmupStableDecay(warmup="2%", decay="20%")),
        GradientClipping(NormClip(max_norm=1.0)),
        BatchSizeScheduler(BatchSizeSteps({"0%": 4, "50%": 8}), lr_scaling="sqrt"),
        OptimizationMonitor(),
        ModelCheckpoint(folder / "checkpoints", every_n_train_steps=every, save_top_k=1),
        takes,
    ]
    trainer = L.Trainer(
        **{
            **QUIET,
            "max_steps": steps,
            "callbacks": callbacks,
            "logger": TensorBoardLogger(folder, name="", version="log"),
            "log_every_n_steps": LOG_EVERY,
            "enable_checkpointing": True,
        }
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        trainer.fit(TinyModule(), DataLoader(data, batch_size=4, shuffle=True))
    return takes.samples


def slope(samples: list[Sample]) -> tuple[float, float]:
    """Fits a line to the memory; returns bytes per step, and half of the 95 % interval."""
    x = torch.tensor([sample.step for sample in samples], dtype=torch.float64)
    y = torch.tensor([sample.memory for sample in samples], dtype=torch.float64)
    x, y = x - x.mean(), y - y.mean()
    rate = (x @ y) / (x @ x)
    error = ((y - rate * x).square().sum() / (len(samples) - 2) / (x @ x)).sqrt()
    return float(rate), QUANTILE * float(error)


def grown(first: Sample, last: Sample) -> dict[str, int]:
    """Returns the types of which there are more objects than before, with the difference."""
    return {name: n for name, n in (last.objects - first.objects).most_common(5) if n}


def measure(*, steps: int = 100_000, every: int = 5_000) -> str:
    """Trains for many steps, and returns the results as Markdown."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        samples = long_run(Path(folder), steps=steps, every=every)
    return report(samples, seconds=time.monotonic() - began)


def report(samples: list[Sample], *, seconds: float) -> str:
    """Formats samples as Markdown; the first is the end of the warm-up."""
    first, last = samples[0], samples[-1]
    rate, half = (10_000 * value / MEGABYTE for value in slope(samples))
    growth = last.objects.total() - first.objects.total()
    sizes = [sample.checkpoint for sample in samples]
    # Bytes of TensorBoard's files for each logged step, between consecutive samples.
    pairs = itertools.pairwise(samples)
    each = [(b.events - a.events) * LOG_EVERY / (b.step - a.step) for a, b in pairs]
    types = ", ".join(f"{name} +{n}" for name, n in grown(first, last).items()) or "none"
    memory = f"{rate:+.3f} ± {half:.3f} per 10,000 updates (least squares, 95 %)"
    rows = {
        "resident memory (MB)": (first.memory / MEGABYTE, last.memory / MEGABYTE, memory),
        "objects": (first.objects.total(), last.objects.total(), f"{growth:+,}: {types}"),
        "open files": (first.open_files, last.open_files, ""),
        "checkpoint (bytes)": (sizes[0], sizes[-1], f"from {min(sizes):,} to {max(sizes):,}"),
        "TensorBoard's files (bytes)": (
            first.events,
            last.events,
            f"{min(each):,.0f} to {max(each):,.0f} for each logged update",
        ),
    }
    table = [
        f"| {name} | {before:,.5g} | {after:,.5g} | {text} |"
        if isinstance(before, float)
        else f"| {name} | {before:,} | {after:,} | {text} |"
        for name, (before, after, text) in rows.items()
    ]
    lines = [
        INTRODUCTION.format(
            updates=last.step, first=first.step, every=samples[1].step - first.step
        ),
        f"| | after update {first.step:,} | after update {last.step:,} | change |",
        "|---|---:|---:|---|",
        *table,
        "",
        f"It took {seconds:.0f} s, {1000 * seconds / last.step:.2f} ms for each update.",
    ]
    return "\n".join(lines)
