"""Averages of the weights: their cost, and one run at a constant learning rate for every length.

    python benchmarks/averaging.py cost               # prints the cost beside torch's EMA
    python benchmarks/averaging.py horizons           # trains, and adds the losses to a file
    python benchmarks/averaging.py all --write        # writes docs/benchmarks/averaging.md

``horizons`` keeps its results in runs/averaging/losses.json and continues there.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_bigopt import (
    EMA,
    BatchSizeScheduler,
    ConstantBatchSize,
    GlobalBatchLoader,
    GradientClipping,
    LearningRateScheduler,
    Merge,
    ModelAveraging,
    NormClip,
    Progress,
    TailMean,
    WarmupConstant,
)
from lightning_bigopt.callbacks.averaging.averaged_tensors import AveragedTensors
from lightning_bigopt.callbacks.averaging.running_averages import RunningAverages
from lightning_bigopt.examples.gpt import BytesGPT
from lightning_bigopt.examples.text import SourceText

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "averaging.md"
FOLDER = Path("runs") / "averaging"
STEPS, BATCH = 600, 32
LEARNING_RATES = (1.5e-3, 3e-3, 6e-3)
DECAYS = (0.1, 0.2)  # of the length of the run with the decay
SHARES = (0.25, 0.5, 0.75, 1.0)
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
    "num_sanity_val_steps": 0,
}
Losses = dict[str, dict[str, float]]


def averages() -> dict[str, Any]:
    """Returns the averages of a trunk."""
    return {
        "EMA 1 %": EMA("1%"),
        "EMA 3 %": EMA("3%"),
        "TailMean 10 %": TailMean("10%"),
        **{
            f"Merge {share} % {shape}": Merge(over=f"{share}%", emulate=shape)  # type: ignore[arg-type]
            for share in (5, 10, 20)
            for shape in ("linear", "1-sqrt")
        },
    }


def named(all_averages: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns averages under names that ModelAveraging accepts, and their titles."""
    titles = {f"a{index}": title for index, title in enumerate(all_averages)}
    return {name: all_averages[title] for name, title in titles.items()}, titles


class Records(L.Callback):
    """Records the metrics of each validation, by the number of updates."""

    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, float]] = {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = {n: float(v) for n, v in trainer.callback_metrics.items() if "val_loss" in n}
        self.metrics[trainer.global_step] = found


def fit(
    lr: float, seed: int, *callbacks: Any, cooldown: int | None = None, **options: Any
) -> dict[int, dict[str, float]]:
    """Trains a GPT of 0.13M parameters, and returns the metrics of its validations."""
    L.seed_everything(seed, verbose=False)
    module = BytesGPT(lr=lr, width=64, layers=2)
    data = SourceText()
    data.setup("fit")
    records, resume = Records(), options.pop("resume", {})
    settings: dict[str, Any] = {}
    if cooldown is not None:
        settings = {"on_resume": "cooldown", "cooldown": cooldown}
    trainer = L.Trainer(
        **QUIET,
        max_steps=STEPS,
        callbacks=[
            LearningRateScheduler(WarmupConstant(warmup="2%"), **settings),
            BatchSizeScheduler(ConstantBatchSize(BATCH)),
            GradientClipping(NormClip(1.0)),
            *callbacks,
            records,
        ],
        **options,
    )
    loader = GlobalBatchLoader(data.train, micro_batch_size=BATCH, seed=seed)
    trainer.fit(module, loader, data.val_dataloader(), **resume)
    if cooldown is not None:  # the end of a cooldown is no end of an epoch
        trainer.limit_val_batches = 1.0
        trainer.validate(module, data.val_dataloader(), verbose=False)
        records.metrics[trainer.global_step] = {
            "val_loss": float(trainer.callback_metrics["val_loss"])
        }
    return records.metrics


def trunk(lr: float, seed: int) -> Losses:
    """Trains at a constant rate with all averages, then a decay for each length from its states."""
    chosen, titles = named(averages())
    folder = FOLDER / f"{lr:g}-{seed}"
    lengths = [round(share * STEPS) for share in SHARES]
    starts = {(n, d): round(n * (1 - d)) for n in lengths for d in DECAYS}
    every = math.gcd(*starts.values())
    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1)
    averaging = ModelAveraging(chosen, use="training")
    found = fit(lr, seed, averaging, saves, val_check_interval=lengths[0])
    losses: Losses = {}
    for length in lengths:
        row = losses[str(length)] = {"constant": found[length]["val_loss"]}
        for name, title in titles.items():
            metric = f"averages/{name}/val_loss"
            if metric in found[length]:
                row[title] = found[length][metric]
    for (length, decay), start in starts.items():
        resume = {"ckpt_path": folder / f"step={start}.ckpt", "weights_only": True}
        cooldown = length - start
        plain = fit(
            lr, seed, cooldown=cooldown, resume=resume, limit_val_batches=0,
            enable_checkpointing=False,
        )  # fmt: skip
        losses[str(length)][f"decay {decay:.0%}"] = next(iter(plain.values()))["val_loss"]
    for path in folder.glob("*.ckpt"):
        path.unlink()
    return losses


def averaged_decay(lr: float, seed: int) -> dict[str, float]:
    """Trains with a decay to zero over the last 40 %, and an EMA beside it."""
    from lightning_bigopt import WarmupStableDecay

    L.seed_everything(seed, verbose=False)
    module, records, data = BytesGPT(lr=lr, width=64, layers=2), Records(), SourceText()
    data.setup("fit")
    averaging = ModelAveraging({"ema": EMA("1%"), "tail": TailMean("5%")}, use="training")
    trainer = L.Trainer(
        **QUIET,
        max_steps=STEPS,
        val_check_interval=STEPS,
        enable_checkpointing=False,
        callbacks=[
            LearningRateScheduler(WarmupStableDecay(warmup="2%", decay="40%")),
            BatchSizeScheduler(ConstantBatchSize(BATCH)),
            GradientClipping(NormClip(1.0)),
            averaging,
            records,
        ],
    )
    loader = GlobalBatchLoader(data.train, micro_batch_size=BATCH, seed=seed)
    trainer.fit(module, loader, data.val_dataloader())
    return records.metrics[STEPS]


def train_all(seeds: int) -> dict[str, Any]:
    """Trains what the file of results does not have yet, and returns the results."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    file = FOLDER / "losses.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for seed in range(seeds):
        for lr in LEARNING_RATES:
            for kind, run in (("trunk", trunk), ("decay", averaged_decay)):
                key = f"{kind} {lr:g} {seed}"
                if key not in results and (kind == "trunk" or lr == LEARNING_RATES[2]):
                    results[key] = run(lr, seed)
                    file.write_text(json.dumps(results))
                    print(key, results[key], flush=True)
    return results


# ------------------------------------------------------------------------------------ the cost


def layers(count: int, width: int) -> nn.Module:
    """Returns a module of ``count`` matrices."""
    return nn.ParameterList([nn.Parameter(torch.randn(width, width)) for _ in range(count)])


def cost(trials: int) -> dict[str, list[float]]:
    """Measures one update of an EMA in microseconds, ours and torch's in turns."""
    found: dict[str, list[float]] = {}
    for count, width in ((4, 8), (300, 36), (300, 128)):
        module = layers(count, width)
        tensors = AveragedTensors(module, buffers=True)
        running = RunningAverages({"ema": EMA(100)}, device=torch.device("cpu"), dtype=None)
        other = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
        step = 0

        def ours() -> None:
            nonlocal step
            step += 1
            running.add(tensors.local(), Progress(fraction=0.0, steps=step), None)  # noqa: B023

        def theirs() -> None:
            other.update_parameters(module)  # noqa: B023

        name = f"{count} tensors of {width}×{width}"
        times: dict[str, list[float]] = {"ours": [], "torch": []}
        for trial in range(trials):
            for kind, call in (("ours", ours), ("torch", theirs))[:: 1 if trial % 2 else -1]:
                start = time.process_time_ns()
                for _ in range(20):
                    call()
                times[kind].append((time.process_time_ns() - start) / 20e3)
        ratios = [a / b for a, b in zip(times["ours"], times["torch"], strict=True)]
        ratios.sort()
        low, high = ratios[len(ratios) // 20], ratios[-1 - len(ratios) // 20]
        found[name] = [
            median(times["ours"]), median(times["torch"]), median(ratios), low, high
        ]  # fmt: skip
    return found


# ------------------------------------------------------------------------------------ the page


def best_trunk(results: Mapping[str, Any], seeds: int, title: str) -> float:
    """Returns the learning rate at which an average is best at the end, over all seeds."""

    def loss(lr: float) -> float:
        rows = [results[f"trunk {lr:g} {seed}"][str(STEPS)] for seed in range(seeds)]
        return mean(row[title] for row in rows)

    return min(LEARNING_RATES, key=loss)


def horizons_table(results: Mapping[str, Any], seeds: int) -> str:
    """Compares the averages of one trunk with decays whose rate and length are tuned."""
    lengths = [round(share * STEPS) for share in SHARES]
    rows = []
    tuned: dict[int, list[float]] = {}
    for length in lengths:
        each: list[list[float]] = [
            [
                results[f"trunk {lr:g} {seed}"][str(length)][f"decay {decay:.0%}"]
                for seed in range(seeds)
            ]
            for lr in LEARNING_RATES
            for decay in DECAYS
        ]
        tuned[length] = min(each, key=mean)
    heading = "| | " + " | ".join(f"{n} updates" for n in lengths) + " |"
    rows.append(f"| tuned decay | {' | '.join(f'{mean(tuned[n]):.3f}' for n in lengths)} |")
    for title in ["constant", *averages()]:
        lr = best_trunk(results, seeds, title)
        cells = []
        for length in lengths:
            losses = [results[f"trunk {lr:g} {s}"][str(length)].get(title) for s in range(seeds)]
            if None in losses:
                cells.append("")
                continue
            gaps = [a - b for a, b in zip(losses, tuned[length], strict=True)]
            error = stdev(gaps) / seeds**0.5 if seeds > 1 else math.nan
            cells.append(f"{mean(gaps):+.3f} ± {error:.3f}")
        rows.append(f"| {title}, rate {lr:g} | {' | '.join(cells)} |")
    return "\n".join([heading, "|---|" + "---|" * len(lengths), *rows])


def page(results: Mapping[str, Any], costs: Mapping[str, list[float]], seeds: int) -> str:
    """Returns the page."""
    decays = [results[f"decay {LEARNING_RATES[2]:g} {seed}"] for seed in range(seeds)]
    plain = mean(row["val_loss"] for row in decays)
    gain = {
        name: mean(row[f"averages/{name}/val_loss"] - row["val_loss"] for row in decays)
        for name in ("ema", "tail")
    }
    rates = ", ".join(f"{lr:g}" for lr in LEARNING_RATES)
    decay_lengths = ", ".join(f"{d:.0%}" for d in DECAYS)
    lines = "\n".join(
        f"| {name} | {a:.0f} | {b:.0f} | {r:.2f} ({low:.2f} to {high:.2f}) |"
        for name, (a, b, r, low, high) in costs.items()
    )
    return f"""\
# Averages of the weights

## One run for every length

A GPT of 0.13M parameters trains on {BATCH} windows of 64 bytes per update, for {STEPS} updates at a
constant learning rate after a warm-up. At a quarter, a half, three quarters and the end its
averages are validated. They are compared with runs of exactly that length whose learning rate
decays to zero: the best of the rates {rates} and of decays over {decay_lengths} of the
length, chosen for each length by the mean over all seeds. The first row has the validation loss of
these tuned runs in nats per byte. The others have the difference from it, with the standard error
over {seeds} seeds (paired by seed and order of the data); negative is better. Every average uses
one rate for all lengths, the best at the end.

{horizons_table(results, seeds)}

Percentages of `Merge` refer to the run up to the validation, those of `EMA` and `TailMean` to the
whole budget of {STEPS} updates; `TailMean` begins at 90 % of it.

These runs are short: the loss still falls quickly at the end, which favors short decays and short
windows. One model and one data set.

## After a decay

With a decay to zero over the last 40 %, at the rate {LEARNING_RATES[2]:g}, the loss is
{plain:.3f}. An EMA of 1 % changes it by {gain["ema"]:+.4f}, the mean over the last 5 % by
{gain["tail"]:+.4f}: **after a full decay, averages add nothing.**

## The cost of an update

One update of an EMA on one core of a CPU, beside `update_parameters` of torch's `AveragedModel`
with its multi-tensor EMA. The two are timed alternately. The table has medians of the processor
time; the range contains 90 % of the ratios.

| weights | ModelAveraging, µs | torch, µs | ratio |
|---|---|---|---|
{lines}

`Merge` copies the weights at some updates only: with 10 checkpoints over the last fifth of a run it
copies them ten times there.

Run with `python benchmarks/averaging.py all --seeds {seeds} --write`, torch {torch.__version__}.
"""


def main() -> None:
    """Runs the parts, and writes the page on request."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["cost", "horizons", "all"], nargs="?", default="all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=101)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    costs = cost(arguments.trials) if arguments.part != "horizons" else {}
    for name, figures in costs.items():
        print(name, [round(figure, 3) for figure in figures])
    if arguments.part == "cost":
        return
    results = train_all(arguments.seeds)
    print(horizons_table(results, arguments.seeds))
    if arguments.write and costs:
        PAGE.write_text(page(results, costs, arguments.seeds), encoding="utf-8")


if __name__ == "__main__":
    main()
