"""Batch policies side by side on the demo's GPT: the same samples in the same order.

Each policy first looks for its own best peak learning rate in short runs on a seed of its own; what
is reported is other seeds at that rate. ``python benchmarks/batch_size.py --write`` renews
docs/benchmarks/batch_size.md; ``--quick`` only shows that it runs, and with ``--keep FILE`` a run
that was interrupted goes on.
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
class Contender:
    """One policy with the schedule that goes with it, and where its search for a rate begins."""

    title: str
    policy: Callable[[], BatchSizePolicy]
    schedule: Callable[[], Schedule]
    scaling: Any = None
    first_rate: float = 6e-3


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one training came to."""

    loss: float
    updates: int
    seconds: float


@dataclass(kw_only=True)
class Found:
    """What is known of one contender: a loss at every rate tried, and the runs at the best."""

    tried: dict[float, float] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """The best rate tried."""
        return min(self.tried, key=lambda rate: self.tried[rate])


def plain() -> Schedule:
    """Linear to zero after a warm-up, which all but Seesaw follow."""
    return Warmup("2%", Linear(start=1.0, end=0.0))


def traded() -> Seesaw:
    """The same, with half of its decay paid in batch."""
    return Seesaw(plain())


def doublings(*shares: str) -> Callable[[], BatchSizePolicy]:
    """From the small to the large batch, doubled at each share of the budget."""
    pairs = tuple((share, SMALL << n) for n, share in enumerate(("0%", *shares)))
    return lambda: BatchSizeSteps(pairs)


CONTENDERS = (
    Contender(title=f"constant {SMALL}", policy=lambda: ConstantBatchSize(SMALL), schedule=plain),
    Contender(
        title=f"{SMALL} doubled at 25, 50 and 75 %, √ scaling",
        policy=doublings("25%", "50%", "75%"),
        schedule=plain,
        scaling="sqrt",
    ),
    Contender(
        title=f"Seesaw from {SMALL}, at most 8 ×",
        policy=lambda: SeesawBatchSize(traded(), base=SMALL),
        schedule=traded,
    ),
    Contender(
        title=f"constant {LARGE}",
        policy=lambda: ConstantBatchSize(LARGE),
        schedule=plain,
        first_rate=1.2e-2,
    ),
)


class ExactText(SourceText):
    """The demo's text, served to the sample: every contender trains on the same ones in order."""

    def __init__(self, *, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def train_dataloader(self) -> Any:
        """Micro-batches as large as the batch: an update is one pass, whatever its size."""
        return GlobalBatchLoader(self.train, micro_batch_size=LARGE, seed=self.seed)


def train(contender: Contender, *, rate: float, samples: int, seed: int) -> Run:
    """One training, and its validation loss."""
    seed_everything(seed, verbose=False)
    callbacks: list[Callback] = [
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
    """Makes each run once, also where the benchmark was interrupted in between."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.known: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self.known = json.loads(path.read_text(encoding="utf-8"))

    def __call__(self, contender: Contender, *, rate: float, samples: int, seed: int) -> Run:
        """The run, from the file if it is there."""
        key = f"{contender.title}, {rate:g}, {samples} samples, seed {seed}"
        if key not in self.known:
            run = train(contender, rate=rate, samples=samples, seed=seed)
            self.known[key] = asdict(run)
            if self.path is not None:
                self.path.write_text(json.dumps(self.known, indent=1), encoding="utf-8")
        print(f"# {key}: {self.known[key]}", flush=True)
        return Run(**self.known[key])


def tune(contender: Contender, runs: Runs, *, samples: int) -> dict[float, float]:
    """Losses by rate: down or up the grid until both neighbors of the best are worse."""
    tried: dict[float, float] = {}
    at = RATES.index(contender.first_rate)
    while True:
        for near in (at, at - 1, at + 1):
            if 0 <= near < len(RATES) and RATES[near] not in tried:
                run = runs(contender, rate=RATES[near], samples=samples, seed=TUNING_SEED)
                tried[RATES[near]] = run.loss
        best = RATES.index(min(tried, key=lambda rate: tried[rate]))
        if best == at:
            return tried
        at = best


def measure(runs: Runs, *, samples: int, tuning: int, seeds: int) -> Iterator[dict[str, Found]]:
    """By title, after every seed; in the runs that are reported, the contenders take turns."""
    found = {c.title: Found(tried=tune(c, runs, samples=tuning)) for c in CONTENDERS}
    if not seeds:  # the search itself is all there is
        for contender in CONTENDERS:
            mine = found[contender.title]
            mine.runs.append(runs(contender, rate=mine.rate, samples=tuning, seed=TUNING_SEED))
        yield found
    for seed in range(TUNING_SEED + 1, TUNING_SEED + 1 + seeds):
        for contender in CONTENDERS:
            mine = found[contender.title]
            run = runs(contender, rate=mine.rate, samples=samples, seed=seed)
            mine.runs.append(run)
        yield found


def table(found: dict[str, Found]) -> str:
    """The result in Markdown."""
    base = next(iter(found.values()))
    least = mean(run.loss for run in base.runs)
    lines = [
        "| policy | peak rate | validation loss | Δ | updates | ratio | seconds |",
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
    """What the search for each rate saw."""
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
    """The page that holds the tables."""
    seeds_in_words = (
        f"Means over {seeds} seed(s), lowest and highest in brackets"
        if seeds
        else "One seed, that of the search below"
    )
    search = (
        "on another seed than those above, and on the same validation windows"
        if seeds
        else "whose best runs are the ones above"
    )
    return f"""# What a growing batch is worth

The demo's byte-level GPT (0.4M parameters) on Python's own source, {samples:,} samples of 64 bytes
for every policy, the same ones in the same order; AdamW, linear decay to zero after 2 % of warm-up
(Seesaw: the same decay, half of it paid in batch). Every policy at its own best peak learning rate.
{seeds_in_words}; Δ and ratio are to the small batch.

{table(found)}

The rates were looked for in runs of {tuning:,} samples, on a grid of factors of two until both
neighbors of the best were worse, {search}. What that search saw:

{searches(found)}

Seconds are the processor's, on one thread: the wall-clock of a core that has nothing else to do.
`GlobalBatchLoader` serves every update in one micro-batch here, so they show what one process saves
with larger matrices and fewer updates; on many devices, fewer updates save communication too.

One tiny model and one text: a direction, not a law.

Measured with Python {platform.python_version()} and torch {torch.__version__} on one of
{os.cpu_count()} cores ({platform.machine()}). Renew this page with
`python benchmarks/batch_size.py --write`.
"""


def main() -> None:
    """Prints the tables, and writes the page on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=40_000)
    parser.add_argument("--tuning", type=int, default=8_000, help="samples in a run of the search")
    parser.add_argument("--keep", type=Path, help="a file that keeps what every run found")
    parser.add_argument("--seeds", type=int, default=2, help="besides the search's; 0: only that")
    parser.add_argument("--quick", action="store_true", help="1,024 samples, to see that it runs")
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
