"""Trains pilots of the demo's GPT, and compares their predictions with runs in full."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from scipy.stats import spearmanr

from benchmarks.laws.page import write_section
from lightning_bigopt import (
    GradientClipping,
    LearningRateScheduler,
    LossCurve,
    LossLaw,
    NormClip,
    Schedule,
    WarmupConstant,
    WarmupCosine,
    WarmupLinear,
    WarmupStableDecay,
    convex_bound,
)
from lightning_bigopt.examples.gpt import BytesGPT
from lightning_bigopt.examples.text import SourceText

TITLE = "The GPT of the demo"
UPDATES, WARMUP, BATCH, LEARNING_RATE = 10_000, 100, 8, 2e-3
PILOTS = ("constant", "cosine0")
SHARES = (0.15, 0.3, 0.5)
_START = 0.5  # the first losses of a pilot fall faster than the law


def schedules(warmup: int) -> dict[str, Schedule]:
    """Returns the schedules by name; all are predicted."""
    steps = f"{warmup} steps"
    return {
        "constant": WarmupConstant(warmup=steps),
        "cosine10": WarmupCosine(warmup=steps, end=0.1),
        "cosine0": WarmupCosine(warmup=steps, end=0.0),
        "linear0": WarmupLinear(warmup=steps, end=0.0),
        "wsd20sqrt": WarmupStableDecay(warmup=steps, decay="20%"),
        "wsd20lin": WarmupStableDecay(warmup=steps, decay="20%", cooldown="linear"),
    }


class _Losses(Callback):
    """Records learning rates, and the validation loss at regular updates."""

    def __init__(self, batches: Sequence[torch.Tensor], every: int) -> None:
        self.batches, self.every = batches, every
        self.rates: list[float] = []
        self.losses: list[tuple[int, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *batch: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        if trainer.global_step % self.every:
            return
        pl_module.eval()
        with torch.inference_mode():
            loss = mean(float(pl_module.loss(batch)) for batch in self.batches)
        pl_module.train()
        self.losses.append((trainer.global_step, loss))


def run(folder: Path, name: str, *, updates: int, warmup: int, seed: int, every: int) -> LossCurve:
    """Returns the curve of a run; trains it unless the folder has it."""
    path = folder / f"{name}-{updates}-lr{LEARNING_RATE:g}-s{seed}.json"
    if not path.exists():
        seed_everything(seed, verbose=False)
        data = SourceText(micro_batch_size=BATCH)
        data.setup("fit")
        validation = torch.cat(list(data.val_dataloader()))
        losses = _Losses([validation[0::4], validation[2::4]], every)
        trainer = Trainer(
            max_steps=updates,
            max_epochs=-1,
            callbacks=[
                LearningRateScheduler(schedules(warmup)[name]),
                GradientClipping(NormClip()),
                losses,
            ],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            limit_val_batches=0,
        )
        trainer.fit(BytesGPT(lr=LEARNING_RATE), datamodule=data)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"lrs": losses.rates, "vals": losses.losses}))
        print(f"{path.name}: {losses.losses[-1][1]:.4f}", flush=True)
    stored = json.loads(path.read_text())
    return LossCurve(
        learning_rates=stored["lrs"][:updates],
        updates=[update for update, _ in stored["vals"]],
        losses=[loss for _, loss in stored["vals"]],
        name=name,
    )


@dataclass(frozen=True, kw_only=True)
class _Result:
    """Predictions of the final losses from pilots of one length."""

    share: float
    start: int
    law: LossLaw
    finals: dict[str, tuple[float, float, float]]
    truth: dict[str, float]

    @property
    def error(self) -> float:
        """Mean absolute error of the final losses."""
        return mean(abs(self.finals[name][0] - loss) for name, loss in self.truth.items())

    @property
    def correlation(self) -> float:
        """Spearman's rank correlation of predicted and measured final losses."""
        predicted = [self.finals[name][0] for name in self.truth]
        return float(spearmanr(predicted, list(self.truth.values())).statistic)

    @property
    def inside(self) -> int:
        """Number of final losses inside the band."""
        return sum(
            self.finals[name][1] <= loss <= self.finals[name][2]
            for name, loss in self.truth.items()
        )


def gpt(folder: Path, *, seeds: int, quick: bool = False, write: bool = False) -> None:
    """Trains all runs, predicts the long ones from the pilots, and prints the errors.

    Args:
        folder: Keeps the runs, so that an interrupted benchmark goes on.
        seeds: Number of seeds; the final losses are means over them, the pilots have seed 0.
        quick: Whether to train a few updates only.
        write: Whether to write the section of the page.
    """
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    updates, warmup = (40, 2) if quick else (UPDATES, WARMUP)
    long = {
        name: [
            run(
                folder, name, updates=updates, warmup=warmup, seed=seed, every=max(updates // 40, 1)
            )
            for seed in range(seeds)
        ]
        for name in schedules(warmup)
    }
    truth = {name: mean(c.losses[-1] for c in of_seeds) for name, of_seeds in long.items()}
    results = []
    for share in SHARES[-1:] if quick else SHARES:
        length = round(share * updates)
        pilots = [
            run(folder, name, updates=length, warmup=warmup, seed=0, every=max(length // 30, 1))
            for name in PILOTS
        ]
        for start in (0,) if quick else (0, round(_START * length)):
            law = LossLaw.fit(pilots, start=start)
            finals = {}
            for name, of_seeds in long.items():
                found = law.predict_learning_rates(of_seeds[0].learning_rates)
                finals[name] = (found.final, *found.final_band)
            result = _Result(share=share, start=start, law=law, finals=finals, truth=truth)
            results.append(result)
            print(
                f"pilots of {share:.0%} from update {start}: MAE {result.error:.4f}, "
                f"Spearman {result.correlation:.2f}, {result.inside} of {len(truth)} in the band"
            )
    bounds = [convex_bound(schedule, updates) for schedule in schedules(warmup).values()]
    order = float(spearmanr(bounds, list(truth.values())).statistic)
    print(f"convex bound, without pilots: Spearman {order:.2f}")
    if write:
        write_section(TITLE, _section(results, truth, order, seeds))


def _section(results: Sequence[_Result], truth: dict[str, float], order: float, seeds: int) -> str:
    table = [
        f"| {each.share:.0%} | {each.start} | {each.error:.3f} | {each.correlation:.2f} | "
        f"{each.inside} of {len(truth)} |"
        for each in results
    ]
    first, last = results[0], f"{results[-1].share:.0%} from {results[-1].start}"
    losses = [
        f"| {name} | {loss:.3f} | {first.finals[name][0]:.3f} | {first.finals[name][1]:.3f} to "
        f"{first.finals[name][2]:.3f} | {results[-1].finals[name][0]:.3f} |"
        for name, loss in sorted(truth.items(), key=lambda item: item[1])
    ]
    widths = [np.ptp(first.finals[name][1:]) for name in truth]
    return f"""\
Run with `python benchmarks/loss_law.py --gpt DIR --seeds {seeds} --write`; measured on
{time.strftime("%Y-%m-%d")} on a CPU, one thread. The GPT of the demo
(0.4M parameters, AdamW, `NormClip()`, learning rate {LEARNING_RATE:g}, warm-up of {WARMUP} updates)
trains {UPDATES:,} updates with six schedules. Two pilots, `WarmupConstant` and
`WarmupCosine(end=0.0)`, train a share of these updates,
and predict the final validation loss of all six. "From" is the first update whose loss is fitted
(`start=`).

| pilots, each | from | mean absolute error | Spearman | in the band |
|---|---|---|---|---|
{chr(10).join(table)}
| none, `convex_bound` | | | {order:.2f} | |

| schedule | measured | pilots of {first.share:.0%} | band of 90 % | pilots of {last} |
|---|---|---|---|---|
{chr(10).join(losses)}

The goal was pilots of 15 % with Spearman ≥ 0.9 and a mean absolute error of at most 0.010. The loss
of so short pilots still falls faster than any power law, and the law extrapolates it too far down.
The band is {min(widths):.2f} to {max(widths):.2f} wide there.
"""
