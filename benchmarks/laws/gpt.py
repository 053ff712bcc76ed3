"""Trains pilots of the demo's GPT, and compares their predictions with runs in full."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

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
from lightning_bigopt.planning.expected_loss import ExpectedLoss

TITLE = "The GPT of the demo"
UPDATES, WARMUP, BATCH, LEARNING_RATE = 10_000, 100, 8, 2e-3
PILOTS = (("constant", "cosine0"), ("wsd20lin", "linear0"))
SHARES = (0.15, 0.3, 0.5)  # the first with several seeds
_STARTS = (0.0, 0.5)  # fractions of a pilot; its first losses fall faster than the law


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
    batch = f"b{BATCH}-w{warmup}-e{every}"
    path = folder / f"{name}-{updates}-{batch}-lr{LEARNING_RATE:g}-s{seed}.json"
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
    """Predictions of the final losses from pilots of one kind, by seed of the pilots."""

    pilots: tuple[str, ...]
    share: float
    start: int
    finals: list[dict[str, ExpectedLoss]]
    truth: dict[str, float]

    @property
    def errors(self) -> list[float]:
        """Mean absolute error of the final losses."""
        return [
            mean(abs(found[name].final - loss) for name, loss in self.truth.items())
            for found in self.finals
        ]

    @property
    def correlations(self) -> list[float]:
        """Spearman's rank correlation of predicted and measured final losses."""
        return [
            _correlation([found[name].final for name in self.truth], self.truth)
            for found in self.finals
        ]

    @property
    def inside(self) -> str:
        """Number of final losses inside the band."""
        bands = [
            (found[name].final_band, self.truth[name]) for found in self.finals for name in found
        ]
        return f"{sum(low <= loss <= high for (low, high), loss in bands)} of {len(bands)}"


def _correlation(predicted: Sequence[float], truth: dict[str, float]) -> float:
    return float(spearmanr(predicted, list(truth.values())).statistic)


def gpt(folder: Path, *, seeds: int, quick: bool = False, write: bool = False) -> None:
    """Trains all runs, predicts the long ones from the pilots, and prints the errors.

    Args:
        folder: Keeps the runs, so that an interrupted benchmark goes on.
        seeds: Number of seeds of the shortest pilots; all other runs have seed 0.
        quick: Whether to train a few updates only.
        write: Whether to write the section of the page.
    """
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    updates, warmup = (40, 2) if quick else (UPDATES, WARMUP)
    long = {
        name: run(folder, name, updates=updates, warmup=warmup, seed=0, every=max(updates // 40, 1))
        for name in schedules(warmup)
    }
    truth = {name: curve.losses[-1] for name, curve in long.items()}

    def predictions(names: Sequence[str], length: int, start: int, seed: int) -> Any:
        every = max(length // 30, 1)
        pilots = [
            run(folder, name, updates=length, warmup=warmup, seed=seed, every=every)
            for name in names
        ]
        law = LossLaw.fit(pilots, start=start)
        return {n: law.predict_learning_rates(c.learning_rates) for n, c in long.items()}

    results = []
    for share in SHARES[-1:] if quick else SHARES:
        length = round(share * updates)
        for names, start in product(PILOTS, _STARTS[:1] if quick else _STARTS):
            first = round(start * length)
            number = seeds if share == SHARES[0] else 1
            finals = [predictions(names, length, first, seed) for seed in range(number)]
            results.append(
                _Result(pilots=names, share=share, start=first, finals=finals, truth=truth)
            )
            print(
                f"{' and '.join(names)}, {share:.0%} from update {first}: "
                f"MAE {median(results[-1].errors):.4f}, "
                f"Spearman {median(results[-1].correlations):.2f}, "
                f"{results[-1].inside} in the band"
            )
    bounds = [convex_bound(schedule, updates) for schedule in schedules(warmup).values()]
    order = _correlation(bounds, truth)
    print(f"convex bound, without pilots: Spearman {order:.2f}")
    if write:
        write_section(TITLE, _section(results, truth, order, seeds))


def _section(results: Sequence[_Result], truth: dict[str, float], order: float, seeds: int) -> str:
    table = [
        f"| {', '.join(each.pilots)} | {each.share:.0%} | {each.start} | {len(each.errors)} | "
        f"{_range(each.errors, 3)} | {_range(each.correlations, 2)} | {each.inside} |"
        for each in results
    ]
    shortest = [each for each in results if each.share == SHARES[0]]
    losses = [
        f"| {name} | {loss:.3f} | "
        + " | ".join(
            f"{found.final:.3f} ({found.final_band[0]:.2f} to {found.final_band[1]:.2f})"
            for found in (each.finals[0][name] for each in shortest)
        )
        + " |"
        for name, loss in sorted(truth.items(), key=lambda item: item[1])
    ]
    heads = [f"{', '.join(each.pilots)} from {each.start}" for each in shortest]
    close = sorted(truth.values())[:-1]
    first, second = (each for each in shortest if each.start)
    lower = sum(b < a for a, b in zip(first.errors, second.errors, strict=True))
    counts = [each.inside.split(" of ") for each in results]
    inside = " of ".join(str(sum(int(count[n]) for count in counts)) for n in (0, 1))
    return f"""\
Run with `python benchmarks/loss_law.py --gpt DIR --seeds {seeds} --write`; measured on
{time.strftime("%Y-%m-%d")} on a CPU, one thread. The GPT of the demo (0.4M parameters, AdamW,
`NormClip()`, {BATCH} windows of 64 bytes, learning rate {LEARNING_RATE:g}, warm-up of {WARMUP}
updates) trains {UPDATES:,} updates with six schedules. Two pilots train a share of these updates,
and predict the final validation loss of all six. "From" is the first update whose loss is fitted
(`start=`). The figures are the median over the seeds of the pilots, and the range.

| pilots | share | from | seeds | mean absolute error | Spearman | in the band of 90 % |
|---|---|---|---|---|---|---|
{chr(10).join(table)}
| none, `convex_bound` | | | | | {order:.2f} | |

The predictions of the pilots of {SHARES[0]:.0%} with seed 0, and their bands:

| schedule | measured | {" | ".join(heads)} |
|---|---|{"---|" * len(heads)}
{chr(10).join(losses)}

The goal was pilots of 15 % with Spearman ≥ 0.9 and a mean absolute error of at most 0.010; it is
not met. {len(close)} of the {len(truth)} losses differ by {close[-1] - close[0]:.3f}: the error of
the law would have to be below that for runs {1 / SHARES[0]:.1f} times as long as the pilots.

- The first half of a short pilot falls faster than a power law. With it, the law predicts far too
  low a loss; fit the second half.
- A constant learning rate and a slow decay do not determine how fast a decay gains its drop. A
  short cooldown beside a long decay does so better: from the second half of pilots of
  {SHARES[0]:.0%}, its error is lower at {lower} of {len(first.errors)} seeds. This pair was chosen
  with seed 0.
- The correlation of this pair may be luck: with longer pilots it is lower.
- The bands are wide, and contain {inside} losses: they say that these pilots do not rank the
  schedules.
- `convex_bound` ranks them without any run. For another learning rate and length, 0.004 and 2,000
  updates of 32 windows, its correlation was 0.60.
"""


def _range(values: Sequence[float], digits: int) -> str:
    """Returns the median, and the range of several values."""
    middle = f"{median(values):.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"
