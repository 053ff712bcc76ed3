"""Measures the overhead of the callbacks, and of Lightning's own logging, over a bare Trainer.

All variants train the same model in turn, so that other work on the machine affects all of them
alike. A figure is the median over rounds of the difference from the bare Trainer in the same round,
with its 90 % confidence interval. Times are processor time of the whole process, including the
thread that writes TensorBoard's file.
``python benchmarks/monitor.py --write`` regenerates docs/benchmarks/monitor.md; ``--only N``
regenerates one of its tables.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import disable_possible_user_warnings, grad_norm
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    GradientClipping,
    LearningRateScheduler,
    NormClip,
    OptimizationMonitor,
    WarmupCosine,
    WarmupStableDecay,
    ZClip,
)
from lightning_bigopt.examples.gpt import TransformerBlock

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "monitor.md"
WARM_UP = 5


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, the length of a training, and the number of rounds.

    Slow variants take part only in every ``slow_every``-th round.
    """

    title: str
    blocks: int
    steps: int
    slow_steps: int
    rounds: int
    slow_every: int = 4
    variants: tuple[str, ...] = ("bare", "empty", "readme", "a", "a-csv", "b", "b-full", "c")
    has_length: bool = True


WORKLOADS = (
    Workload(title="Tiny perceptron, 4 tensors", blocks=0, steps=150, slow_steps=50, rounds=60),
    Workload(
        title="Tiny perceptron, loader without a length",
        blocks=0,
        steps=150,
        slow_steps=50,
        rounds=60,
        variants=("bare", "empty", "readme", "b"),
        has_length=False,
    ),
    Workload(
        title="GPT of 300 tensors", blocks=30, steps=50, slow_steps=15, rounds=24, slow_every=3
    ),
    Workload(
        title="GPT of 300 tensors, all values and activations",
        blocks=30,
        steps=50,
        slow_steps=15,
        rounds=9,
        slow_every=3,
        variants=("bare", "a", "a-all", "b-full", "b-activations", "c"),
    ),
    Workload(
        title="GPT of 3,000 tensors",
        blocks=300,
        steps=10,
        slow_steps=5,
        rounds=3,
        slow_every=1,
        variants=("bare", "a", "a-csv", "c"),
    ),
)
SLOW = {"a", "a-all", "a-csv", "c"}
VARIANTS = {
    "bare": "bare Trainer, `gradient_clip_val`",
    "empty": "with four empty callbacks",
    "readme": "the README's four callbacks",
    "a": "a. lightning_bigopt: schedule, ZClip, norms of every parameter, every step",
    "a-all": "a. with all four values of every parameter, every step",
    "a-csv": "a. with CSVLogger instead of TensorBoard",
    "b": "b. lightning_bigopt, every 50 steps",
    "b-full": "b. lightning_bigopt with all values of the monitor, by block, every 50 steps",
    "b-activations": "b. the same with activations of every block, every 50 steps",
    "c": "c. Lightning: LearningRateMonitor and `log_dict(grad_norm(self, 2))`",
}


class Same(Dataset[Tensor]):
    """Returns the same batch again and again, at no cost."""

    def __init__(self, batch: Tensor) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1_000_000

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        return self.batch


class Endless:
    """An iterable without a length that yields the same batch."""

    def __init__(self, batch: Tensor) -> None:
        self.batch, self.batch_size = batch, len(batch)

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield self.batch


def loader(batch: Tensor, *, has_length: bool) -> Any:
    if has_length:
        return DataLoader(Same(batch), batch_size=len(batch), collate_fn=lambda found: found)
    return Endless(batch)


class Model(L.LightningModule):
    """A stack of transformer blocks, or a tiny perceptron; records when its steps begin."""

    def __init__(self, blocks: int, *, log_norms: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net: nn.Module = (
            nn.Sequential(*(TransformerBlock(width=32, heads=2, length=8) for _ in range(blocks)))
            if blocks
            else nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
        )
        self.log_norms = log_norms
        self.began: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.began.append(time.process_time())
        return self.net(batch).square().mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.log_norms:
            self.log_dict(grad_norm(self, norm_type=2))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def package_callbacks(**options: Any) -> list[L.Callback]:
    return [
        LearningRateScheduler(WarmupCosine(warmup="10%")),
        GradientClipping(ZClip()),
        OptimizationMonitor(**options),
    ]


def readme() -> list[L.Callback]:
    """Returns the list in README.md; the batch stays the same, so that every step is an update."""
    return [
        LearningRateScheduler(WarmupStableDecay(warmup="10%", decay="20%")),
        GradientClipping(NormClip(max_norm=1.0)),
        BatchSizeScheduler(BatchSizeSteps({"0%": 8, "100%": 16})),
        OptimizationMonitor(),
    ]


def seconds_per_step(variant: str, work: Workload, folder: str) -> float:
    """Measures the mean time of a step, logging included, after some steps of warm-up."""
    steps = work.slow_steps if variant == "c" else work.steps
    every = 1 if variant in {"a", "a-all", "a-csv", "c"} else 50
    norms: dict[str, Any] = {"layers": "parameters", "per_layer": ["grad_norm"]}
    callbacks: Mapping[str, list[L.Callback]] = {
        "bare": [],
        "empty": [L.Callback() for _ in range(4)],
        "readme": readme(),
        "a": package_callbacks(**norms),
        "a-all": package_callbacks(layers="parameters"),
        "a-csv": package_callbacks(**norms),
        "b": package_callbacks(**norms),
        "b-full": package_callbacks(),
        "b-activations": package_callbacks(activations="blocks"),
        "c": [LearningRateMonitor()],
    }
    logger = CSVLogger(folder) if variant == "a-csv" else TensorBoardLogger(folder)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=WARM_UP + steps + 1,
        logger=logger,
        log_every_n_steps=every,
        callbacks=callbacks[variant],
        gradient_clip_val=1.0 if variant in {"bare", "empty", "c"} else None,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Model(work.blocks, log_norms=variant == "c")
    batch = torch.randn(8, 8, 32) if work.blocks else torch.randn(8, 32)
    trainer.fit(model, loader(batch, has_length=work.has_length))
    return (model.began[-1] - model.began[WARM_UP]) / (len(model.began) - 1 - WARM_UP)


Found = Mapping[str, tuple[float, float, float]]


def measure(work: Workload, rounds: int) -> Found:
    """Measures the time over the bare Trainer's, in ms: its median and interval by variant.

    The bare Trainer has its own time, ``"beyond"`` is the README's list over the empty callbacks,
    and ``"activations"`` the monitor with them over the same monitor without them.
    """
    differences: dict[str, list[float]] = {name: [] for name in work.variants}
    for trial in range(rounds):
        names = [n for n in work.variants if n not in SLOW or trial % work.slow_every == 0]
        times: dict[str, float] = {}
        for name in names if trial % 2 else names[::-1]:
            with tempfile.TemporaryDirectory() as folder:
                times[name] = 1e3 * seconds_per_step(name, work, folder)
        for name, found in times.items():
            differences[name].append(found - (0.0 if name == "bare" else times["bare"]))
        if "readme" in times:
            differences.setdefault("beyond", []).append(times["readme"] - times["empty"])
        if "b-activations" in times:
            more = times["b-activations"] - times["b-full"]
            differences.setdefault("activations", []).append(more)
    return {name: with_interval(values) for name, values in differences.items()}


def with_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the median and its 90 % confidence interval by order statistics.

    The interval is the whole range if there are too few values.
    """
    ordered, count = sorted(values), len(values)
    outside, low = 2.0 * 0.5**count, 0
    while low + 1 < (count + 1) // 2:
        outside += 2.0 * math.comb(count, low + 1) * 0.5**count
        if outside > 0.1:
            break
        low += 1
    return median(ordered), ordered[low], ordered[count - 1 - low]


def table(work: Workload, found: Found) -> str:
    """Formats one table in Markdown."""
    bare, low, high = found["bare"]
    lines = [
        f"## {work.title}",
        "",
        "| | difference from the bare Trainer | 90 % interval | fraction of c |",
        "|---|---|---|---|",
        f"| {VARIANTS['bare']} | {bare:.3f} ms a step | {low:.3f} to {high:.3f} | |",
    ]
    for name in work.variants[1:]:
        middle, low, high = found[name]
        share = f"{middle / found['c'][0]:.3f}" if "c" in found else ""
        lines.append(
            f"| {VARIANTS[name]} | {middle:+.3f} ms ({100 * middle / bare:+.1f} %) | "
            f"{low:+.3f} to {high:+.3f} | {share} |"
        )
    if "beyond" in found:
        middle, low, high = found["beyond"]
        lines.append(
            f"\nThe README's list beyond the empty callbacks: {middle:+.3f} ms, {low:+.3f} to "
            f"{high:+.3f} ({100 * middle / bare:+.1f} % of this step, {100 * middle / 30:+.2f} % "
            "of 30 ms)."
        )
    if "activations" in found:
        middle, low, high = found["activations"]
        lines.append(
            f"\nThe activations beyond the same monitor without them: {middle:+.3f} ms, "
            f"{low:+.3f} to {high:+.3f} ({100 * middle / bare:+.2f} % of this step)."
        )
    return "\n".join(lines)


def merged(tables: Mapping[str, str]) -> str:
    """Returns the tables of the page, with the measured tables in place of the old ones."""
    former = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    known = {
        match[1]: match[0].strip()
        for match in re.finditer(
            r"^## (.+)\n(?:\n?\|.*\n)+(?:\nThe (?:README's list|activations) .+\n)?",
            former,
            flags=re.MULTILINE,
        )
    }
    known.update(tables)
    return "\n\n".join(known[work.title] for work in WORKLOADS if work.title in known)


def page(body: str) -> str:
    """Returns the page with the tables."""
    return f"""# The cost of monitoring

This page compares the cost of schedule, adaptive clipping and monitor with that of Lightning's
own logging of the same curves. Costs are relative to a bare Trainer with `gradient_clip_val`. The
variants take turns. A number is the median over rounds of the difference from the bare Trainer in
the same round, in processor time of the whole process (including the thread that writes
TensorBoard's file). The next column is a 90 % confidence interval of this median (the whole range
if there were only a few rounds).

{body}

Lightning's `log_dict` costs time on every step, logged or not, because `self.log` stores each
value and TensorBoard receives one call per value. `OptimizationMonitor` keeps its values on the
device, transfers them in one copy on logged steps, and passes one event to TensorBoard. The empty
callbacks show the cost of Lightning's dispatch of hooks. The time of the bare Trainer includes
torch's own clipping, which GradientClipping replaces in the variants a and b.

Measured with Python {platform.python_version()}, torch {torch.__version__} and Lightning
{L.__version__} on {os.cpu_count()} cores ({platform.machine()}), one thread. Regenerate this page
with `python benchmarks/monitor.py --write`.
"""


def main() -> None:
    """Prints the tables, and writes the page on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round, no 3,000 tensors")
    parser.add_argument("--only", type=int, help="the index of one workload")
    parser.add_argument("--rounds", type=int, help="number of rounds instead of the default")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    disable_possible_user_warnings()
    import logging

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    works = WORKLOADS[:4] if arguments.quick else WORKLOADS
    if arguments.only is not None:
        works = WORKLOADS[arguments.only : arguments.only + 1]
    tables = {}
    for work in works:
        rounds = 1 if arguments.quick else arguments.rounds or work.rounds
        tables[work.title] = table(work, measure(work, rounds))
        print(tables[work.title], flush=True)
    if arguments.write:
        PAGE.write_text(page(merged(tables)), encoding="utf-8")


if __name__ == "__main__":
    main()
