"""Batch policies side by side on the demo's GPT: the same samples, the same seeds.

``python benchmarks/batch_size.py --write`` renews docs/benchmarks/batch_size.md; ``--quick`` only
shows that it runs.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_bigopt import (
    BatchSizePolicy,
    BatchSizeScheduler,
    BatchSizeSteps,
    ConstantBatchSize,
    GradientClipping,
    LearningRateScheduler,
    Linear,
    NormClip,
    Schedule,
    Seesaw,
    SeesawBatchSize,
    Warmup,
)
from lightning_bigopt.examples.gpt import BytesGPT
from lightning_bigopt.examples.text import SourceText

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "batch_size.md"
SMALL, LARGE = 16, 128


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One policy with the schedule that goes with it."""

    title: str
    policy: Callable[[], BatchSizePolicy]
    schedule: Callable[[], Schedule]
    scaling: Any = None
    lr_factor: float = 1.0


def plain() -> Schedule:
    """Linear to zero after a warm-up, which all but Seesaw follow."""
    return Warmup("2%", Linear(start=1.0, end=0.0))


def traded() -> Seesaw:
    """The same, with half of its decay paid in batch."""
    return Seesaw(plain())


CONTENDERS = (
    Contender(title=f"constant {SMALL}", policy=lambda: ConstantBatchSize(SMALL), schedule=plain),
    Contender(
        title=f"ramp {SMALL} → {LARGE}, √ scaling",
        policy=lambda: BatchSizeSteps(
            {"0%": SMALL, "10%": 2 * SMALL, "25%": 4 * SMALL, "50%": LARGE}
        ),
        schedule=plain,
        scaling="sqrt",
    ),
    Contender(
        title=f"Seesaw from {SMALL}, at most 8 ×",
        policy=lambda: SeesawBatchSize(traded(), base=SMALL),
        schedule=traded,
    ),
    Contender(
        title=f"constant {LARGE}, √ scaled",
        policy=lambda: ConstantBatchSize(LARGE),
        schedule=plain,
        lr_factor=(LARGE / SMALL) ** 0.5,
    ),
)


def train(contender: Contender, *, samples: int, seed: int) -> tuple[float, int, float]:
    """Validation loss, updates and seconds of one run."""
    seed_everything(seed, verbose=False)
    callbacks = [
        LearningRateScheduler(contender.schedule()),
        GradientClipping(NormClip(max_norm=1.0)),
        BatchSizeScheduler(
            contender.policy(), lr_scaling=contender.scaling, budget=f"{samples} samples"
        ),
    ]
    trainer = Trainer(
        max_steps=-1,
        max_epochs=-1,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    model = BytesGPT(lr=6e-3 * contender.lr_factor, width=64, layers=2)
    data = SourceText(micro_batch_size=SMALL)
    start = time.perf_counter()
    trainer.fit(model, datamodule=data)
    seconds = time.perf_counter() - start
    updates = trainer.global_step
    judge = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    found = judge.validate(model, datamodule=data, verbose=False)
    return float(found[0]["val_loss"]), updates, seconds


def measure(samples: int, seeds: int) -> list[tuple[str, list[float], int, float]]:
    """Rows: title, losses, updates, mean seconds; the contenders take turns."""
    found: dict[str, list[tuple[float, int, float]]] = {c.title: [] for c in CONTENDERS}
    for seed in range(seeds):
        for contender in CONTENDERS:
            found[contender.title].append(train(contender, samples=samples, seed=seed))
    return [
        (title, [run[0] for run in runs], runs[0][1], mean(run[2] for run in runs))
        for title, runs in found.items()
    ]


def table(rows: Sequence[tuple[str, list[float], int, float]]) -> str:
    """The rows in Markdown."""
    lines = ["| policy | validation loss | updates | seconds |", "|---|---|---|---|"]
    for title, losses, updates, seconds in rows:
        spread = f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
        lines.append(f"| {title} | {mean(losses):.3f}{spread} | {updates} | {seconds:.0f} |")
    return "\n".join(lines)


def page(body: str, samples: int, seeds: int) -> str:
    """The page that holds the table."""
    return f"""# What a growing batch is worth

The demo's byte-level GPT (width 64, two layers) on Python's own source, {samples:,} samples of 64
bytes for every policy, micro-batches of {SMALL}, AdamW with a peak learning rate of 6e-3 at a batch
of {SMALL}; linear decay to zero after 2 % of warm-up (Seesaw: the same decay, half of it paid in
batch). Means over {seeds} seed(s), lowest and highest in brackets.

{body}

The ramp starts where a small batch is worth most and ends where a large one is; the constant large
batch pays for its few updates with its loss. On one process of a CPU all of them put as many
micro-batches through the model, so the seconds hardly differ: what fewer updates save is
communication and optimiser steps, on many devices. One tiny model and one text: a direction, not a
law.

Measured with Python {platform.python_version()} and torch {torch.__version__} on {os.cpu_count()}
cores ({platform.machine()}). Renew this page with `python benchmarks/batch_size.py --write`.
"""


def main() -> None:
    """Prints the table, and writes the page on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=40_000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="1,024 samples, to see that it runs")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    samples = 1024 if arguments.quick else arguments.samples
    body = table(measure(samples, arguments.seeds))
    print(body)
    if arguments.write:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(page(body, samples, arguments.seeds), encoding="utf-8")


if __name__ == "__main__":
    main()
