"""Trains a GPT with some bad batches, with and without StepGuard.

    python benchmarks/bad_batches.py                     # nine runs of 1,000 updates
    python benchmarks/bad_batches.py --seeds 2 --write   # writes docs/benchmarks/bad_batches.md
    python benchmarks/bad_batches.py --updates 300

2 % of the batches are bad: their loss, and so their gradient, is multiplied by NaN, by infinity or
by 10 to 1,000, one at a time or four in a row. The first 50 updates are good, because the guard
needs a history to detect outliers. The optimizer is AdamW without the fused kernel, which would
skip non-finite gradients by itself.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_bigopt import (
    GradientClipping,
    LearningRateScheduler,
    NormClip,
    StepGuard,
    WarmupCosine,
)
from lightning_bigopt.examples.gpt import BytesGPT
from lightning_bigopt.examples.text import ByteWindows, read_sources

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "bad_batches.md"
CALM = 50
LENGTH = 32
FACTORS = (math.nan, math.inf, 10.0, 30.0, 100.0, 300.0, 1000.0)


def bad_updates(updates: int, *, share: float = 0.02, seed: int = 0) -> dict[int, float]:
    """Draws the bad updates and their factors; half of them are in bursts of four."""
    rng = torch.Generator().manual_seed(seed)
    wanted = max(6, round(share * updates))
    bad: dict[int, float] = {}
    while len(bad) < wanted:
        burst = 4 if len(bad) < wanted // 2 else 1
        first = int(torch.randint(CALM, updates - burst, (), generator=rng))
        if all(abs(first - other) > 2 * burst for other in bad):
            for offset in range(burst):
                bad[first + offset] = FACTORS[len(bad) % len(FACTORS)]
    return bad


class Batches:
    """Batches of text that depend on their index only; resumable."""

    def __init__(self, updates: int, *, size: int = 32, seed: int = 0) -> None:
        self.windows = ByteWindows(read_sources("train"), length=LENGTH)
        self.updates, self.batch_size, self.position = updates, size, 0
        self.seed = seed

    def __len__(self) -> int:
        return self.updates

    def __iter__(self) -> Iterator[Tensor]:
        for number in range(self.position, self.updates):
            rng = torch.Generator().manual_seed(1_000_003 * self.seed + number)
            picks = torch.randint(len(self.windows), (self.batch_size,), generator=rng).tolist()
            self.position = number + 1
            yield torch.stack([self.windows[pick] for pick in picks])
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class BadBatchGPT(BytesGPT):
    """The example's GPT with 0.1M parameters, whose loss is multiplied at given updates."""

    def __init__(self, bad: dict[int, float], *, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__(width=56, layers=2, heads=4, length=LENGTH)
        self.bad = bad

    def training_step(self, batch: Tensor) -> Tensor:
        return self.loss(batch) * self.bad.get(self.trainer.global_step, 1.0)

    def validation_step(self, batch: Tensor) -> None:
        self.log("val_loss", self.loss(batch))  # torchmetrics would leave NaN out of the mean

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.parameters(), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.1, foreach=True
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """The result of a run."""

    loss: float
    finite: bool
    rejected: tuple[int, ...]
    weights: tuple[Tensor, ...]
    state: dict[str, Any]


def train(
    *,
    updates: int,
    bad: dict[int, float],
    max_norm: float | None = 1.0,
    guarded: bool = True,
    seed: int = 0,
    callbacks: tuple[Callback, ...] = (),
    ckpt_path: Path | None = None,
) -> Run:
    """Trains once, from the same weights on the same batches."""
    model = BadBatchGPT(bad, seed=seed)
    guard = StepGuard()
    chosen = [LearningRateScheduler(WarmupCosine(warmup="10%", end=0.1)), *callbacks]
    chosen += [GradientClipping(NormClip(max_norm=max_norm))] if max_norm is not None else []
    chosen += [guard] if guarded else []
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=chosen,
        logger=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, Batches(updates, seed=seed), validation_loader(), ckpt_path=ckpt_path)
    weights = tuple(parameter.detach().clone() for parameter in model.parameters())
    return Run(
        loss=trainer.callback_metrics["val_loss"].item(),
        finite=all(bool(weight.isfinite().all()) for weight in weights),
        rejected=tuple(rejected.update for rejected in guard.rejections),
        weights=weights,
        state=guard.saved_state(),
    )


def validation_loader() -> DataLoader[Tensor]:
    """Returns a loader of 512 windows, evenly spaced over the validation files."""
    windows = ByteWindows(read_sources("val"), length=LENGTH)
    picks = [index * len(windows) // 512 for index in range(512)]
    return DataLoader(Subset(windows, picks), batch_size=512)


HEADER = """\
| seed | clip | batches | guard | loss | minus clean run | caught | false rejections |
|---|---|---|---|---|---|---|---|
"""


def rows(updates: int, seeds: int) -> Iterator[str]:
    """Yields the rows of the table, one for each run."""
    for seed, max_norm in itertools.product(range(seeds), (1.0, 10.0)):
        drawn = bad_updates(updates, seed=seed)
        finite = {at: factor for at, factor in drawn.items() if math.isfinite(factor)}
        runs = [
            ("clean", {}, False),
            ("clean", {}, True),
            ("bad", drawn, True),
            ("bad without NaN and inf", finite, False),
        ]
        if (seed, max_norm) == (0, 1.0):
            runs.append(("bad", drawn, False))
        clean = math.nan
        for batches, bad, guarded in runs:
            run = train(updates=updates, bad=bad, max_norm=max_norm, guarded=guarded, seed=seed)
            clean = run.loss if not bad and not guarded else clean
            caught = len(set(run.rejected) & set(bad))
            found = (
                f"{caught} of {len(bad)} | {len(set(run.rejected) - set(bad))}"
                if guarded
                else " | "
            )
            yield (
                f"| {seed} | {max_norm:g} | {batches} | {'yes' if guarded else 'no'} "
                f"| {run.loss:.3f} | {run.loss - clean:+.3f} | {found} |\n"
            )


def page(table: str, updates: int, seeds: int) -> str:
    """Returns the page with the table."""
    return f"""\
# Training with bad batches, with and without StepGuard

Measured with `python benchmarks/bad_batches.py --seeds {seeds} --write` on {os.cpu_count()} cores,
torch {torch.__version__}, one thread. A GPT with 0.1M parameters is trained for {updates:,} updates
of AdamW without the fused kernel. In {len(bad_updates(updates))} bad batches the loss is multiplied
by NaN, by infinity or by 10 to 1,000, singly or four in a row. A seed determines weights, batches
and bad updates. The loss is the validation loss in nats per byte. The clean run of the difference
has no guard. A false rejection is a good update that was skipped.

{table}
Results:

- With the guard, a run with bad batches ends at the loss of the clean run, with either threshold.
- Without the guard, the first NaN ruins the run. Clipping at 1 already limits finite spikes; the
  rows without NaN and infinity show the remaining difference.
- On clean data, a run in which the guard rejects nothing is identical to the run without it.
- The benchmark has one small model, {seeds} seeds and synthetic spikes.
  [Spike rules](spike_rules.md) compares the guard's rule with others on many tasks.
"""


def main() -> None:
    """Prints the table, and writes the page on request."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # Lightning asks for more workers
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if arguments.updates < 200:  # the first 50 are good, and bursts keep a distance
        parser.error(f"--updates must be at least 200, got {arguments.updates}")
    print(HEADER, end="", flush=True)
    table = HEADER
    for row in rows(arguments.updates, arguments.seeds):
        print(row, end="", flush=True)
        table += row
    if arguments.write:
        PAGE.write_text(page(table, arguments.updates, arguments.seeds), encoding="utf-8")


if __name__ == "__main__":
    main()
