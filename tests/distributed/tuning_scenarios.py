"""Branches on two processes of the CPU: critical batch size, and a batch that follows it.

Each function returns plain data that ``test_tuning.py`` compares. All run in one start-up::

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m \
        tests.distributed.tuning_scenarios FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    GradientClipping,
    LearningRateScheduler,
    Linear,
    MeasuredBatchSize,
    ZClip,
    critical_batch_size,
)
from tests.distributed.capability_scenarios import numbers, trainer
from tests.helpers import cpu_precision

CASES = ("ddp 32-true", "ddp 16-mixed", "fsdp2 bf16-mixed")
SAMPLES, EPOCHS, MICRO = 384, 2, 4


class Regression(L.LightningModule):
    """Records the samples that this process has trained."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
        self.seen: list[list[float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.seen.append(x[:, 0].tolist())
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Sharded(Regression):
    """The same under FSDP2."""

    def configure_model(self) -> None:
        for layer in (self.net[0], self.net[2]):
            if not hasattr(layer, "set_requires_gradient_sync"):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def made(name: str) -> Regression:
    torch.manual_seed(1)
    return Regression() if name.startswith("ddp") else Sharded()


def data() -> DataLoader[Any]:
    x = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(7))
    return DataLoader(TensorDataset(x, x[:, :1].sin()), batch_size=MICRO, shuffle=True)


def callbacks() -> list[Any]:
    return [LearningRateScheduler(Linear(end=0.2)), GradientClipping(ZClip())]


def grown(out: Path) -> Any:
    """Trains with measured sizes, and with the same sizes written in advance."""
    found = {}
    for case in CASES:
        name, precision = case.split()
        policies = (
            MeasuredBatchSize(
                8, high=32, check_every="25%", window="64 samples", evaluate=4, tolerance=1e9
            ),
            BatchSizeScheduler(
                BatchSizeSteps({"0%": 8, "192 samples": 16, "384 samples": 32}), lr_scaling="sqrt"
            ),
        )
        runs = []
        for policy in policies:
            module = made(name)
            fitted = trainer(
                name, *callbacks(), policy, max_epochs=EPOCHS, **cpu_precision(precision)
            )
            fitted.fit(module, data())
            runs.append([numbers(dict(module.named_parameters())), module.seen])
            if policy is policies[0]:
                updates = fitted.global_step
        found[case] = {
            "runs": runs,
            "updates": updates,
            "measured": [
                [at, one.batch_size, one.losses, one.samples]
                for at, one in policies[0].measurements
            ],
        }
    return found


def critical(out: Path) -> Any:
    """Measures at the start of a run, and trains it, or only trains it."""
    found = {}
    for case in CASES:
        name, precision = case.split()
        runs, results = [], []
        for measure in (True, False):
            module = made(name)
            fitted = trainer(name, *callbacks(), max_epochs=1, **cpu_precision(precision))
            loader = data()
            torch.manual_seed(3)
            if measure:
                result = critical_batch_size(
                    fitted, module, loader, window="96 samples", evaluate=5, multiples=(1, 2, 3)
                )
                results = [result.losses, result.batch_size, result.window, result.updates]
            fitted.fit(module, loader)
            runs.append([numbers(dict(module.named_parameters())), module.seen])
        found[case] = {"runs": runs, "result": results}
    return found


NAMES = ["grown", "critical"]


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out = Path(sys.argv[1])
    results = {name: globals()[name](out) for name in NAMES}
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
