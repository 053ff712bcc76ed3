"""Measures the critical batch size, and doubles the batch when it allows it.

    python benchmarks/critical_batch.py                  # both parts, eight seeds: about an hour
    python benchmarks/critical_batch.py growth --seeds 2
    python benchmarks/critical_batch.py digits
    python benchmarks/critical_batch.py --results runs.json --write   # writes the page

``growth``: a small byte-level GPT is trained on the same samples with a constant batch of 8, with
MeasuredBatchSize from 8 to 32, and with a ramp that is written in advance. The seeds pair the runs.

``digits``: the batch size at which training in full on handwritten digits loses the tolerance, the
one that branches measure in the course of a run with the base batch, and the gradient noise scale.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    ConstantBatchSize,
    GradientClipping,
    GradientNoiseScale,
    LearningRateScheduler,
    MeasuredBatchSize,
    NormClip,
    WarmupStableDecay,
)
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.stage import Batch
from lightning_bigopt.examples import BytesGPT, SourceText
from lightning_bigopt.tuning.batch_measurement import BatchMeasurement
from lightning_bigopt.tuning.critical_batch import CriticalBatchSize
from lightning_bigopt.tuning.trial_callbacks import branch_callbacks

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "critical_batch.md"
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
SAMPLES, BASE, LENGTH = 48_000, 8, 32
_FIRST_SEED = 20  # lower ones have served to choose the defaults of MeasuredBatchSize
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
ARMS = ("constant", "measured", "ramp")


class Model(BytesGPT):
    """The example's GPT with 27,000 parameters."""

    def __init__(self, lr: float) -> None:
        super().__init__(lr=lr, width=32, layers=1, heads=2, length=LENGTH)

    def training_step(self, batch: Tensor) -> Tensor:
        return self.loss(batch)


def batch_callback(arm: str, samples: int) -> BatchSizeScheduler:
    """Returns the callback of an arm; MeasuredBatchSize has its defaults."""
    budget = f"{samples} samples"
    if arm == "constant":
        return BatchSizeScheduler(ConstantBatchSize(BASE), budget=budget)
    if arm == "ramp":
        sizes = BatchSizeSteps({"0%": BASE, "25%": 2 * BASE, "50%": 4 * BASE})
        return BatchSizeScheduler(sizes, lr_scaling="sqrt", budget=budget)
    return MeasuredBatchSize(BASE, high=4 * BASE, budget=budget)


def train(arm: str, *, seed: int, lr: float, samples: int) -> dict[str, Any]:
    """Trains one arm, and returns its validation loss and its cost."""
    seed_everything(seed, verbose=False)
    batches = batch_callback(arm, samples)
    trainer = Trainer(
        **QUIET,
        max_epochs=-1,
        callbacks=[
            LearningRateScheduler(WarmupStableDecay(warmup="5%", decay="20%")),
            GradientClipping(NormClip(max_norm=1.0)),
            batches,
        ],
    )
    model, data = Model(lr), SourceText(micro_batch_size=BASE, length=LENGTH)
    start = time.perf_counter()
    trainer.fit(model, datamodule=data)
    seconds = time.perf_counter() - start
    loss = trainer.validate(model, datamodule=data, verbose=False)[0]["val_loss"]
    measured = getattr(batches, "measurements", [])
    return {
        "loss": loss,
        "updates": trainer.global_step,
        "branch_updates": sum(found.updates for _, found in measured),
        "branch_samples": sum(found.samples for _, found in measured),
        "seconds": seconds,
        "doublings": [
            [at, found.batch_size, found.differences[-1], found.standard_errors[-1]]
            for at, found in measured
        ],
    }


# ------------------------------------------------------------------------------------- digits

DIGIT_SAMPLES, DIGIT_BASE, TOLERANCE = 40_000, 8, 0.01
DIGIT_MULTIPLES = (1, 2, 4, 8, 16)
POINTS = (0.2, 0.4, 0.6)


class Digits(LightningModule):
    """A perceptron on 8 x 8 images of digits, with noise on the images."""

    def __init__(self, lr: float = 2e-3) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )

    def training_step(self, batch: Any) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(
            self.net(images + 0.3 * torch.randn_like(images)), labels
        )

    def validation_step(self, batch: Any) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Returns two thirds of the digits for training, and the rest with noise."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.data, dtype=torch.float32) / 16
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train_, rest = order[:1200], order[1200:].repeat(10)
    noise = torch.randn(len(rest), 64, generator=torch.Generator().manual_seed(1))
    return (
        TensorDataset(images[train_], labels[train_]),
        TensorDataset(images[rest] + 0.3 * noise, labels[rest]),
    )


class MeasuresAt(Capability):
    """Measures the critical batch size, and reads the noise scale, at shares of the run."""

    owns = "measurements of the benchmark"
    rank = 1000
    needs_horizon = True

    def __init__(self) -> None:
        self.found: list[tuple[float, CriticalBatchSize, float | None]] = []

    def begin_batch(self, batch: Batch) -> None:
        due = [point for point in POINTS if batch.fit.clock.fraction >= point]
        if not batch.opens_window or len(due) <= len(self.found):
            return
        measurement = BatchMeasurement(multiples=DIGIT_MULTIPLES, tolerance=TOLERANCE)
        result = measurement.run(
            batch.fit,
            batch_size=DIGIT_BASE,
            micro_batch=DIGIT_BASE // 2,
            callbacks=branch_callbacks,
            seed=len(due),
        )
        scale = batch.fit.required(GradientNoiseScale).noise_scale
        self.found.append((due[-1], result, scale))


def train_digits(multiple: int, *, seed: int, measure: bool) -> dict[str, Any]:
    """Trains in full with a multiple of the base batch."""
    seed_everything(seed, verbose=False)
    training, validation = digits()
    measures = MeasuresAt()
    # The noise scale needs two micro-batches in an update.
    micro = DIGIT_BASE // 2
    callbacks: list[Callback] = [
        LearningRateScheduler(WarmupStableDecay(warmup="5%", decay="20%")),
        BatchSizeScheduler(
            ConstantBatchSize(multiple * DIGIT_BASE), budget=f"{DIGIT_SAMPLES} samples"
        ),
    ]
    if measure:
        callbacks += [GradientNoiseScale(), measures]
    trainer = Trainer(**QUIET, max_epochs=-1, callbacks=callbacks)
    model = Digits(2e-3 * math.sqrt(multiple))
    trainer.fit(model, DataLoader(training, batch_size=micro, shuffle=True, drop_last=True))
    loader = DataLoader(validation, batch_size=2000)
    loss = trainer.validate(model, loader, verbose=False)[0]["val_loss"]
    return {
        "loss": loss,
        "measured": [
            [point, found.critical_batch_size, found.is_lower_bound, scale]
            for point, found, scale in measures.found
        ],
    }


# ------------------------------------------------------------------------------------- report


class Results:
    """Keeps finished runs in a file, if there is one."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.runs: dict[str, Any] = {}
        if path is not None and path.exists():
            self.runs = json.loads(path.read_text())

    def get(self, key: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in self.runs:
            self.runs[key] = run()
            print(key, self.runs[key], flush=True)
            if self.path is not None:
                self.path.write_text(json.dumps(self.runs))
        return self.runs[key]


def growth(results: Results, seeds: int, samples: int) -> str:
    """Runs the arms at the best learning rate of the constant batch; returns a Markdown text."""
    tuned = {
        lr: results.get(
            f"tune {samples} {lr:g}",
            lambda lr=lr: train("constant", seed=1000, lr=lr, samples=samples),
        )["loss"]
        for lr in RATES
    }
    lr = min(tuned, key=tuned.__getitem__)
    rows, found = [], {arm: [] for arm in ARMS}
    for seed in range(_FIRST_SEED, _FIRST_SEED + seeds):
        for arm in ARMS:
            run = results.get(
                f"{arm} {samples} {seed}",
                lambda arm=arm, seed=seed: train(arm, seed=seed, lr=lr, samples=samples),
            )
            found[arm].append(run)
    base = found["constant"]
    for arm in ARMS:
        runs = found[arm]
        updates = [
            (run["updates"] + run["branch_updates"]) / other["updates"]
            for run, other in zip(runs, base, strict=True)
        ]
        losses = [run["loss"] - other["loss"] for run, other in zip(runs, base, strict=True)]
        error = statistics.stdev(losses) / math.sqrt(seeds) if seeds > 1 else math.nan
        share = statistics.mean(run["branch_samples"] for run in runs) / samples
        rows.append(
            f"| {arm} | {statistics.mean(run['loss'] for run in runs):.4f} "
            f"| {statistics.mean(losses):+.4f} ± {error:.4f} "
            f"| {statistics.mean(updates):.3f} ({min(updates):.3f} to {max(updates):.3f}) "
            f"| {100 * share:.1f} % |\n"
        )
    tuning = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in tuned.items())
    doublings = "; ".join(
        f"seed {seed}: "
        + ", ".join(
            f"{batch} at {100 * at / samples:.0f} % ({difference:+.4f} ± {error:.4f})"
            for at, batch, difference, error in run["doublings"]
        )
        for seed, run in enumerate(found["measured"][:3], start=_FIRST_SEED)
    )
    return (
        f"Learning rate of the constant batch (loss with seed 1000): {tuning}; used: {lr:g}.\n\n"
        "| batch size | validation loss | minus constant | updates / constant, with branches "
        "| samples of branches |\n|---|---|---|---|---|\n" + "".join(rows) + "\n"
        f"The measurements (batch, position, difference of twice the batch): {doublings}.\n"
    )


def crossing(losses: dict[int, float], tolerance: float) -> float:
    """Returns the batch size at which the loss is the tolerance above that of the base batch."""
    sizes = sorted(losses)
    for low, high in pairwise(sizes):
        below, above = losses[low] - losses[sizes[0]], losses[high] - losses[sizes[0]]
        if above > tolerance >= below:
            return low * (high / low) ** ((tolerance - below) / (above - below))
    return float(sizes[-1])


def measure_digits(results: Results, seeds: int) -> str:
    """Compares the measured critical batch with training in full; returns a Markdown text."""
    losses = {
        DIGIT_BASE * k: statistics.mean(
            results.get(
                f"digits {k} {seed}",
                lambda k=k, seed=seed: train_digits(k, seed=seed, measure=k == 1),
            )["loss"]
            for seed in range(seeds)
        )
        for k in DIGIT_MULTIPLES
    }
    trained = crossing(losses, TOLERANCE)
    rows = []
    for index, point in enumerate(POINTS):
        measured = [results.runs[f"digits 1 {s}"]["measured"][index] for s in range(seeds)]
        center = math.exp(statistics.mean(math.log(found[1]) for found in measured))
        scales = [found[3] for found in measured if found[3]]
        noise = f"{statistics.median(scales):.0f}" if scales else "not reliable"
        rows.append(
            f"| {point:.0%} | {center:.0f} ({min(f[1] for f in measured):.0f} to "
            f"{max(f[1] for f in measured):.0f}) | {center / trained:.2f} | {noise} |\n"
        )
    trained_losses = ", ".join(f"{size}: {loss:.4f}" for size, loss in losses.items())
    return (
        f"Validation loss of training in full by batch size: {trained_losses}. It is "
        f"{TOLERANCE:g} above that of {DIGIT_BASE} at a batch of {trained:.0f}.\n\n"
        "| position | measured critical batch (range of the seeds) | / trained | noise scale |\n"
        "|---|---|---|---|\n" + "".join(rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=("growth", "digits", "all"), default="all")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--results", type=Path, default=None)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    results = Results(arguments.results)
    texts = []
    if arguments.part in ("growth", "all"):
        texts.append(
            "## Growing the batch\n\n" + growth(results, arguments.seeds, arguments.samples)
        )
    if arguments.part in ("digits", "all"):
        texts.append("## The trained critical batch\n\n" + measure_digits(results, arguments.seeds))
    print("\n".join(texts))
    if arguments.write:
        introduction = PAGE.read_text().split("## ")[0]
        PAGE.write_text(introduction + "\n".join(texts))


if __name__ == "__main__":
    main()
