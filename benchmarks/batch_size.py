"""Compares batch-size policies on the GPT of the demo, with the same samples in the same order.

The peak learning rate of each policy is tuned in short runs with one seed. The results come from
other seeds at that learning rate. ``python benchmarks/batch_size.py --write`` regenerates
docs/benchmarks/batch_size.md. ``--quick`` only tests that the script runs. ``--keep FILE`` stores
results, so that an interrupted run can continue.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_bigopt import (
    BatchSizePolicy,
    BatchSizeScheduler,
    BatchSizeSteps,
    ConstantBatchSize,
    GlobalBatchLoader,
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
RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2)
TUNING_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One policy with its schedule, and the first learning rate of its search."""

    title: str
    policy: Callable[[], BatchSizePolicy]
    schedule: Callable[[], Schedule]
    scaling: Any = None
    first_rate: float = 6e-3


@dataclass(frozen=True, kw_only=True)
class Run:
    """The result of one training run."""

    loss: float
    updates: int
    seconds: float


@dataclass(kw_only=True)
class Found:
    """The results of one policy: a loss for each learning rate, and the runs at the best one."""

    tried: dict[float, float] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """The best learning rate."""
        return min(self.tried, key=lambda rate: self.tried[rate])


def plain() -> Schedule:
    """Linear decay to zero after a warm-up; the schedule of all policies but Seesaw."""
    return Warmup("2%", Linear(start=1.0, end=0.0))


def traded() -> Seesaw:
    """The same, with half of its decay replaced by growth of the batch."""
    return Seesaw(plain())


def doublings(*shares: str) -> Callable[[], BatchSizePolicy]:
    """Doubles the batch at each fraction of the budget."""
    pairs = tuple((share, SMALL << n) for n, share in enumerate(("0%", *shares)))
    return lambda: BatchSizeSteps(pairs)


VARIANTS = (
    Variant(title=f"constant {SMALL}", policy=lambda: ConstantBatchSize(SMALL), schedule=plain),
    Variant(
        title=f"{SMALL} doubled at 25, 50 and 75 %, √ scaling",
        policy=doublings("25%", "50%", "75%"),
        schedule=plain,
        scaling="sqrt",
    ),
    Variant(
        title=f"Seesaw from {SMALL}, at most 8 ×",
        policy=lambda: SeesawBatchSize(traded(), base=SMALL),
        schedule=traded,
    ),
    Variant(
        title=f"constant {LARGE}",
        policy=lambda: ConstantBatchSize(LARGE),
        schedule=plain,
        first_rate=1.2e-2,
    ),
)


class ExactText(SourceText):
    """The demo's text: every policy trains on the same samples in the same order."""

    def __init__(self, *, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def train_dataloader(self) -> Any:
        """Returns a loader whose micro-batches are whole updates."""
        return GlobalBatchLoader(self.train, micro_batch_size=LARGE, seed=self.seed)


def train(variant: Variant, *, rate: float, samples: int, seed: int) -> Run:
    """Trains once, and returns the validation loss."""
    seed_everything(seed, verbose=False)
    callbacks: list[Callback] = [
        LearningRateScheduler(variant.schedule()),
        GradientClipping(NormClip(max_norm=1.0)),
        BatchSizeScheduler(
            variant.policy(), lr_scaling=variant.scaling, budget=f"{samples} samples"
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
    model, data = BytesGPT(lr=rate), ExactText(seed=seed)
    start = time.process_time()
    trainer.fit(model, datamodule=data)
    seconds = time.process_time() - start
    judge = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    loss = judge.validate(model, datamodule=data, verbose=False)[0]["val_loss"]
    return Run(loss=float(loss), updates=trainer.global_step, seconds=seconds)


class Runs:
    """Makes each run once, also if the benchmark was interrupted."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.known: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self.known = json.loads(path.read_text(encoding="utf-8"))

    def __call__(self, variant: Variant, *, rate: float, samples: int, seed: int) -> Run:
        """Returns a run, from the file if it contains it."""
        key = f"{variant.title}, {rate:g}, {samples} samples, seed {seed}"
        if key not in self.known:
            run = train(variant, rate=rate, samples=samples, seed=seed)
            self.known[key] = asdict(run)
            if self.path is not None:
                self.path.write_text(json.dumps(self.known, indent=1), encoding="utf-8")
        print(f"# {key}: {self.known[key]}", flush=True)
        return Run(**self.known[key])


def tune(variant: Variant, runs: Runs, *, samples: int) -> dict[float, float]:
    """Returns losses by learning rate, up to a best one whose two neighbors are worse."""
    tried: dict[float, float] = {}
    at = RATES.index(variant.first_rate)
    while True:
        for near in (at, at - 1, at + 1):
            if 0 <= near < len(RATES) and RATES[near] not in tried:
                run = runs(variant, rate=RATES[near], samples=samples, seed=TUNING_SEED)
                tried[RATES[near]] = run.loss
        best = RATES.index(min(tried, key=lambda rate: tried[rate]))
        if best == at:
            return tried
        at = best


def measure(runs: Runs, *, samples: int, tuning: int, seeds: int) -> Iterator[dict[str, Found]]:
    """Yields the results by title after every seed; in reported runs the policies take turns."""
    found = {c.title: Found(tried=tune(c, runs, samples=tuning)) for c in VARIANTS}
    if not seeds:  # only the tuning runs are made
        for variant in VARIANTS:
            mine = found[variant.title]
            mine.runs.append(runs(variant, rate=mine.rate, samples=tuning, seed=TUNING_SEED))
        yield found
    for seed in range(TUNING_SEED + 1, TUNING_SEED + 1 + seeds):
        for variant in VARIANTS:
            mine = found[variant.title]
            run = runs(variant, rate=mine.rate, samples=samples, seed=seed)
            mine.runs.append(run)
        yield found


def table(found: dict[str, Found]) -> str:
    """Formats the results in Markdown."""
    base = next(iter(found.values()))
    least = mean(run.loss for run in base.runs)
    lines = [
        "| policy | peak learning rate | validation loss | Δ | updates | ratio | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, mine in found.items():
        losses, updates = [run.loss for run in mine.runs], mine.runs[0].updates
        seconds = mean(run.seconds for run in mine.runs)
        spread = f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
        lines.append(
            f"| {title} | {mine.rate:g} | {mean(losses):.3f}{spread} | {mean(losses) - least:+.3f} "
            f"| {updates} | {updates / base.runs[0].updates:.2f} × | {seconds:.0f} |"
        )
    return "\n".join(lines)


def searches(found: dict[str, Found]) -> str:
    """Formats the losses of the tuning runs in Markdown."""
    rates = sorted({rate for mine in found.values() for rate in mine.tried})
    lines = [
        f"| policy | {' | '.join(f'{rate:g}' for rate in rates)} |",
        f"|---|{'---|' * len(rates)}",
    ]
    for title, mine in found.items():
        cells = (f"{mine.tried[r]:.3f}" if r in mine.tried else "" for r in rates)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(found: dict[str, Found], *, samples: int, tuning: int, seeds: int) -> str:
    """Returns the page with the tables."""
    seeds_in_words = (
        f"Means over {seeds} seeds, with the lowest and highest value in parentheses"
        if seeds > 1
        else "One seed"
        if seeds
        else "One seed, that of the tuning runs below"
    )
    search = (
        "with another seed than above and on the same validation windows"
        if seeds
        else "of which the best are shown above"
    )
    return f"""# The effect of a growing batch

The byte-level GPT of the demo (0.4M parameters) is trained on Python's source files. Every policy
uses the same {samples:,} samples of 64 bytes in the same order, AdamW, a warm-up over 2 % and
linear decay to zero (Seesaw replaces half of this decay by growth of the batch), at its own best
peak learning rate. {seeds_in_words}. Δ and ratio are relative to the constant small batch.

{table(found)}

The learning rates were tuned in runs of {tuning:,} samples, on a grid of factors of two until
both neighbors of the best were worse, {search}. The table shows the validation losses of these
runs:

{searches(found)}

Seconds are processor time on one thread. `GlobalBatchLoader` yields every update as one
micro-batch here, so the times show the savings of one process from larger matrices and fewer
updates. On many devices, fewer updates also save communication.

These are results of one tiny model on one text. Treat them as rough indications.

Measured with Python {platform.python_version()} and torch {torch.__version__} on one of
{os.cpu_count()} cores ({platform.machine()}). Regenerate this page with
`python benchmarks/batch_size.py --write`.
"""


def main() -> None:
    """Prints the tables, and writes the page on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=40_000)
    parser.add_argument("--tuning", type=int, default=8_000, help="samples in a tuning run")
    parser.add_argument("--keep", type=Path, help="file that stores the result of every run")
    parser.add_argument(
        "--seeds", type=int, default=2, help="seeds besides that of the tuning runs; 0 for none"
    )
    parser.add_argument("--quick", action="store_true", help="1,024 samples, to test that it runs")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    samples, tuning = (1024, 512) if arguments.quick else (arguments.samples, arguments.tuning)
    samples = samples if arguments.seeds else tuning
    measured = measure(Runs(arguments.keep), samples=samples, tuning=tuning, seeds=arguments.seeds)
    for done, found in enumerate(measured, start=min(1, arguments.seeds)):
        print(table(found), searches(found), sep="\n\n", flush=True)
        if arguments.write:
            PAGE.parent.mkdir(parents=True, exist_ok=True)
            PAGE.write_text(
                page(found, samples=samples, tuning=tuning, seeds=done), encoding="utf-8"
            )


if __name__ == "__main__":
    main()
