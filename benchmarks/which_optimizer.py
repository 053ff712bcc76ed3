"""Trains the GPT of the demo with several optimizers, each at its own best learning rate.

    python benchmarks/which_optimizer.py --write  # writes docs/benchmarks/which_optimizer.md
    python benchmarks/which_optimizer.py --quick  # only tests that the script runs
    python benchmarks/which_optimizer.py --keep /tmp/runs.json  # an interrupted run can continue

Seed 0 finds the learning rate, from three values a factor of two apart and at most two more where
the best one is at an edge. Seed 1 is trained at that rate, too. Variants of AdamW are trained at
the rate of AdamW. The state of an optimizer is measured in bytes per parameter. Optimizers of
libraries that are not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.append(str(Path(sys.prefix) / "optimizers"))

import schedulefree
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from lightning_bigopt import (
    GradientClipping,
    LearningRateScheduler,
    NormClip,
    WarmupConstant,
    WarmupLinear,
    muon_adamw,
)
from lightning_bigopt.examples.gpt import BytesGPT
from lightning_bigopt.examples.text import SourceText

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "which_optimizer.md"
SEEDS = (0, 1)
Groups = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An optimizer, made of parameter groups and a learning rate, and the first rates to try."""

    name: str
    make: Callable[[Any, float], Any]
    of_module: bool = False  # made of the module instead of groups
    rates: tuple[float, ...] = (6e-3, 1.2e-2, 2.4e-2)  # empty for the best rate of AdamW
    schedule: Any = field(default_factory=lambda: WarmupLinear(warmup="5%"))


class GPT(BytesGPT):
    """The GPT of the demo with another optimizer."""

    def __init__(self, candidate: Candidate, lr: float) -> None:
        super().__init__(width=64, layers=2)
        self.candidate, self.lr = candidate, lr

    def configure_optimizers(self) -> Any:
        groups: Groups = super().configure_optimizers().param_groups
        kept = [{key: group[key] for key in ("params", "weight_decay")} for group in groups]
        return self.candidate.make(self if self.candidate.of_module else kept, self.lr)


def candidates() -> Iterator[Candidate]:
    """Yields the optimizers whose libraries are installed."""
    adam: dict[str, Any] = {"betas": (0.9, 0.95)}
    of = torch.optim
    yield Candidate(name="AdamW", make=lambda g, lr: of.AdamW(g, lr=lr, **adam))
    yield Candidate(
        name="AdamW, fused",
        make=lambda g, lr: of.AdamW(g, lr=lr, fused=True, **adam),
        rates=(),
    )
    yield Candidate(
        name="NAdam",
        make=lambda g, lr: of.NAdam(g, lr=lr, decoupled_weight_decay=True, **adam),
    )
    yield Candidate(
        name="Adafactor",
        make=lambda g, lr: of.Adafactor(g, lr=lr),
        rates=(2.4e-2, 4.8e-2, 9.6e-2),
    )
    yield Candidate(
        name="SGD, momentum 0.9",
        make=lambda g, lr: of.SGD([{**x, "weight_decay": 0.0} for x in g], lr=lr, momentum=0.9),
        rates=(0.1, 0.2, 0.4),
    )
    yield Candidate(
        name="Muon beside AdamW (muon_adamw)",
        make=lambda module, lr: muon_adamw(module, lr=lr),
        of_module=True,
    )
    yield Candidate(
        name="AdamWScheduleFree",
        make=lambda g, lr: schedulefree.AdamWScheduleFree(g, lr=lr, betas=(0.95, 0.95)),
        rates=(1.2e-2, 2.4e-2, 4.8e-2),
        schedule=WarmupConstant(warmup="5%"),
    )
    if find_spec("prodigyopt"):
        import prodigyopt

        yield Candidate(
            name="Prodigy",
            make=lambda g, lr: prodigyopt.Prodigy(g, lr=lr, **adam),
            rates=(0.5, 1.0, 2.0),
        )
    if find_spec("pytorch_optimizer"):
        import pytorch_optimizer

        yield Candidate(
            name="Lion",
            make=lambda g, lr: pytorch_optimizer.Lion(g, lr=lr),
            rates=(5e-4, 1e-3, 2e-3),
        )
    if find_spec("torchao"):
        from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8

        for kind in (AdamW8bit, AdamW4bit, AdamWFp8):
            yield Candidate(
                name=f"{kind.__name__} (torchao)",
                make=lambda g, lr, kind=kind: kind(g, lr=lr, **adam),
                rates=(),
            )
    if find_spec("bitsandbytes"):
        import bitsandbytes

        yield Candidate(
            name="AdamW8bit (bitsandbytes)",
            make=lambda g, lr: bitsandbytes.optim.AdamW8bit(g, lr=lr, **adam),
            rates=(),
        )


def state_bytes(optimizer: Any) -> int:
    """Returns the bytes of all tensors in the state of an optimizer, counting shared ones once."""
    storages: dict[int, int] = {}

    def add(value: Any) -> None:
        if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                add(getattr(value, name))
        elif isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()

    for state in optimizer.state.values():
        for value in state.values():
            add(value)
    return sum(storages.values())


def train(candidate: Candidate, lr: float, seed: int, steps: int) -> dict[str, float]:
    """Trains once; returns validation loss, bytes of state per parameter, and seconds."""
    seed_everything(seed, verbose=False)
    model, data = GPT(candidate, lr), SourceText(micro_batch_size=16, validation_samples=512)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[
            LearningRateScheduler(candidate.schedule),
            GradientClipping(NormClip(max_norm=1.0)),
        ],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started = time.perf_counter()
    trainer.fit(model, datamodule=data)
    seconds = time.perf_counter() - started
    model.eval()
    with torch.no_grad():
        losses = [float(model.loss(batch)) for batch in data.val_dataloader()]
    used = sum(state_bytes(optimizer) for optimizer in trainer.optimizers)
    size = sum(parameter.numel() for parameter in model.parameters())
    return {"loss": mean(losses), "bytes": used / size, "seconds": seconds}


class Runs:
    """Trains each combination once, and stores the results in a file on request."""

    def __init__(self, keep: Path | None, steps: int) -> None:
        self.keep, self.steps = keep, steps
        self.known: dict[str, dict[str, float]] = {}
        if keep is not None and keep.exists():
            self.known = json.loads(keep.read_text())

    def run(self, candidate: Candidate, lr: float, seed: int) -> dict[str, float]:
        key = f"{candidate.name} {lr:g} {seed} {self.steps}"
        if key not in self.known:
            self.known[key] = train(candidate, lr, seed, self.steps)
            print(f"{key:48} {self.known[key]}", flush=True)
            if self.keep is not None:
                self.keep.write_text(json.dumps(self.known, indent=1))
        return self.known[key]

    def best_rate(self, candidate: Candidate) -> tuple[float, dict[float, float]]:
        """Returns the best rate, and the loss at each rate that was tried."""
        if not candidate.rates:
            best, _ = self.best_rate(next(candidates()))
            return best, {best: self._loss(candidate, best)}
        losses = {lr: self._loss(candidate, lr) for lr in candidate.rates}
        for _ in range(2):
            best = min(losses, key=losses.__getitem__)
            if best not in {min(losses), max(losses)}:
                break
            lr = best * 2 if best == max(losses) else best / 2
            losses[lr] = self._loss(candidate, lr)
        return min(losses, key=losses.__getitem__), losses

    def _loss(self, candidate: Candidate, lr: float) -> float:
        loss = self.run(candidate, lr, SEEDS[0])["loss"]
        return loss if loss == loss else float("inf")  # noqa: PLR0124 - not a number


def row(runs: Runs, candidate: Candidate) -> tuple[str, float]:
    """Returns the row of the table for an optimizer, and the difference between its seeds."""
    best, losses = runs.best_rate(candidate)
    finals = [runs.run(candidate, best, seed) for seed in SEEDS]
    values = [final["loss"] for final in finals]
    searched = ", ".join(f"{lr:g}: {losses[lr]:.2f}" for lr in sorted(losses))
    text = (
        f"| {candidate.name} | {best:g} | {mean(values):.2f} | "
        f"{', '.join(f'{value:.2f}' for value in values)} | "
        f"{finals[0]['bytes']:.1f} | {searched if candidate.rates else 'not searched'} |"
    )
    return text, max(values) - min(values)


def page(rows: list[tuple[str, float]], steps: int) -> str:
    """Returns the page."""
    lines = "\n".join(text for text, _ in rows)
    spread = max(difference for _, difference in rows)
    return f"""\
# Which optimizer

Run with `python benchmarks/which_optimizer.py --write`. Measured on {time.strftime("%Y-%m-%d")}
on an {platform.machine()} CPU, one thread, with torch {torch.__version__}. Each optimizer trains
the GPT of the demo with 132k parameters for {steps} updates of 16 windows of 64 bytes, with
`WarmupLinear(warmup="5%")` (`WarmupConstant` for schedule-free) and `NormClip(max_norm=1.0)`.

- **Loss** is the validation loss in nats per byte, the mean over two seeds at the best learning
  rate. The first seed selects this learning rate, from values a factor of two apart. Fused and
  low-bit variants of AdamW are trained at the learning rate that was best for AdamW.
- **State** is the memory of the optimizer's state in bytes per parameter. The weights and gradients
  take another 8.

| optimizer | learning rate | loss | each seed | state | first seed at each learning rate |
|---|---|---|---|---|---|
{lines}

This is one small model, one data set and one very short run, in which the loss still falls fast.
Two seeds of one optimizer differ by up to {spread:.2f}. Treat differences below 0.1 as noise. Only
the learning rate was tuned. The weight decay is 0.1 for matrices, and 0 with SGD. The betas are
0.9 and 0.95 in the Adam family, 0.95 and 0.95 for schedule-free, and the defaults of the library
otherwise. `muon_adamw` uses one learning rate for both parts; its momentum rises over 300 updates,
which is longer than this run. The low-bit optimizers quantize the states of tensors with at least
4096 elements.
"""


def main() -> None:
    """Trains all runs, prints the table, and writes the page on request."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--quick", action="store_true", help="a few updates only")
    parser.add_argument("--keep", type=Path, help="file with the results of an interrupted run")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    steps = 3 if arguments.quick else 250
    runs = Runs(arguments.keep, steps)
    rows = [row(runs, candidate) for candidate in candidates()]
    text = page(rows, steps)
    print(text)
    if arguments.write and not arguments.quick:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
