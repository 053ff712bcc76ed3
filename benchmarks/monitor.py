"""The price of seeing: our callbacks beside Lightning's own logging, over a bare Trainer.

Every contender trains the same model in turn (so that a busy machine slows all of them alike);
the differences to the bare Trainer of the same round are put together by their median, with an
interval that holds it nine times in ten. Times are processor seconds of the whole process,
TensorBoard's writing thread included, so that other work on the machine does not count.
``python benchmarks/monitor.py --write`` renews docs/benchmarks/monitor.md; with ``--only N`` one
table of it.
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
    GradientClipping,
    LearningRateScheduler,
    OptimizationMonitor,
    WarmupCosine,
    ZClip,
)
from lightning_bigopt.examples.gpt import TransformerBlock

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "monitor.md"
WARM_UP = 5


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, how long it is trained, and how often.

    Contenders that cost much are seen in every few rounds only.
    """

    title: str
    blocks: int
    steps: int
    slow_steps: int
    rounds: int
    slow_every: int = 4
    contenders: tuple[str, ...] = ("bare", "empty", "a", "a-csv", "b", "b-full", "c")
    has_length: bool = True


WORKLOADS = (
    Workload(title="Tiny perceptron, 4 tensors", blocks=0, steps=150, slow_steps=50, rounds=60),
    Workload(
        title="The same on a loader without a length",
        blocks=0,
        steps=150,
        slow_steps=50,
        rounds=60,
        contenders=("bare", "empty", "b"),
        has_length=False,
    ),
    Workload(
        title="GPT of 300 tensors", blocks=30, steps=50, slow_steps=15, rounds=24, slow_every=3
    ),
    Workload(
        title="GPT of 3,000 tensors",
        blocks=300,
        steps=10,
        slow_steps=5,
        rounds=3,
        slow_every=1,
        contenders=("bare", "a", "a-csv", "c"),
    ),
)
SLOW = {"a", "a-csv", "c"}
CONTENDERS = {
    "bare": "bare Trainer, `gradient_clip_val`",
    "empty": "the same with three empty callbacks",
    "a": "a. ours: schedule, ZClip, norms of every parameter, every step",
    "a-csv": "a. with a CSVLogger instead of TensorBoard",
    "b": "b. ours, every 50 steps",
    "b-full": "b. ours with everything that the monitor knows, by block, every 50 steps",
    "c": "c. Lightning's: LearningRateMonitor and `log_dict(grad_norm(self, 2))`",
}


class Same(Dataset[Tensor]):
    """The same batch again and again, at no cost of its own."""

    def __init__(self, batch: Tensor) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1_000_000

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        return self.batch


class Endless:
    """The same from a loader that does not know how long it is."""

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
    """A stack of transformer blocks, or a tiny perceptron; notes when its steps begin."""

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


def ours(**options: Any) -> list[L.Callback]:
    return [
        LearningRateScheduler(WarmupCosine(warmup="10%")),
        GradientClipping(ZClip()),
        OptimizationMonitor(**options),
    ]


def seconds_per_step(contender: str, work: Workload, folder: str) -> float:
    """The mean time of a step, loggings included, after some steps to warm up."""
    steps = work.slow_steps if contender == "c" else work.steps
    every = 1 if contender in {"a", "a-csv", "c"} else 50
    norms: dict[str, Any] = {"layers": "parameters", "per_layer": ["grad_norm"]}
    callbacks: Mapping[str, list[L.Callback]] = {
        "bare": [],
        "empty": [L.Callback(), L.Callback(), L.Callback()],
        "a": ours(**norms),
        "a-csv": ours(**norms),
        "b": ours(**norms),
        "b-full": ours(),
        "c": [LearningRateMonitor()],
    }
    logger = CSVLogger(folder) if contender == "a-csv" else TensorBoardLogger(folder)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=WARM_UP + steps + 1,
        logger=logger,
        log_every_n_steps=every,
        callbacks=callbacks[contender],
        gradient_clip_val=1.0 if contender in {"bare", "empty", "c"} else None,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Model(work.blocks, log_norms=contender == "c")
    batch = torch.randn(8, 8, 32) if work.blocks else torch.randn(8, 32)
    trainer.fit(model, loader(batch, has_length=work.has_length))
    return (model.began[-1] - model.began[WARM_UP]) / (len(model.began) - 1 - WARM_UP)


Found = Mapping[str, tuple[float, float, float]]


def measure(work: Workload, rounds: int) -> Found:
    """For each contender the median of its time over the bare Trainer's, in ms, and its interval.

    The bare Trainer's own time comes under its name.
    """
    differences: dict[str, list[float]] = {name: [] for name in work.contenders}
    for trial in range(rounds):
        names = [n for n in work.contenders if n not in SLOW or trial % work.slow_every == 0]
        times: dict[str, float] = {}
        for name in names if trial % 2 else names[::-1]:
            with tempfile.TemporaryDirectory() as folder:
                times[name] = 1e3 * seconds_per_step(name, work, folder)
        for name, found in times.items():
            differences[name].append(found - (0.0 if name == "bare" else times["bare"]))
    return {name: with_interval(values) for name, values in differences.items()}


def with_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median with an interval that holds it with a probability of 0.9, by order statistics.

    The whole range where there are too few values for that.
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
    """The rows in Markdown."""
    bare, low, high = found["bare"]
    lines = [
        f"## {work.title}",
        "",
        "| | over the bare Trainer | nine times in ten | share of c |",
        "|---|---|---|---|",
        f"| {CONTENDERS['bare']} | {bare:.3f} ms a step | {low:.3f} to {high:.3f} | |",
    ]
    for name in work.contenders[1:]:
        middle, low, high = found[name]
        share = f"{middle / found['c'][0]:.3f}" if "c" in found else ""
        lines.append(
            f"| {CONTENDERS[name]} | {middle:+.3f} ms ({100 * middle / bare:+.1f} %) | "
            f"{low:+.3f} to {high:+.3f} | {share} |"
        )
    return "\n".join(lines)


def renewed(tables: Mapping[str, str]) -> str:
    """The tables of the page, those that were measured now in place of the former ones."""
    former = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    known = {
        match[1]: match[0].strip()
        for match in re.finditer(r"^## (.+)\n(?:\n?\|.*\n)+", former, flags=re.MULTILINE)
    }
    known.update(tables)
    return "\n\n".join(known[work.title] for work in WORKLOADS if work.title in known)


def page(body: str) -> str:
    """The page that holds the tables."""
    return f"""# The price of seeing

What do schedule, adaptive clipping and monitor cost over a bare Trainer with `gradient_clip_val`,
beside what Lightning itself offers for the same curves? The contenders take turns; a number is the
median over rounds of the difference to the bare Trainer in the same round, in processor time of the
whole process (the thread that writes TensorBoard's file included), and beside it the interval that
holds this median nine times in ten (the whole range where there were only a few rounds).

{body}

Lightning's `log_dict` costs its time on every step, logged or not: `self.log` keeps each of the
values, and TensorBoard gets one call for each of them. The monitor keeps what it measures on the
device, fetches it with one transfer on logged steps, and hands TensorBoard one event. Three empty
callbacks show what Lightning's own dispatch of hooks costs; of ours one takes part in a batch, in
two of its six hooks, or three where the batches must be counted because the loader has no length.
The clipping of the bare Trainer is torch's own, a part of its time; with ours it falls away.

Measured with Python {platform.python_version()}, torch {torch.__version__} and Lightning
{L.__version__} on {os.cpu_count()} cores ({platform.machine()}), one thread. Renew this page with
`python benchmarks/monitor.py --write`.
"""


def main() -> None:
    """Prints the tables, and writes the page on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round, no 3,000 tensors")
    parser.add_argument("--only", type=int, help="the index of one workload")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    disable_possible_user_warnings()
    import logging

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    works = WORKLOADS[:3] if arguments.quick else WORKLOADS
    if arguments.only is not None:
        works = WORKLOADS[arguments.only : arguments.only + 1]
    tables = {}
    for work in works:
        tables[work.title] = table(work, measure(work, 1 if arguments.quick else work.rounds))
        print(tables[work.title], flush=True)
    if arguments.write:
        PAGE.write_text(page(renewed(tables)), encoding="utf-8")


if __name__ == "__main__":
    main()
