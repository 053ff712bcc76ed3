"""The names of LearningRateMonitor are those of the same run without the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_bigopt import Constant, LearningRateScheduler, OptimizationMonitor
from tests.helpers import QUIET, ResumableLoader

SGD, ADAM = torch.optim.SGD, torch.optim.Adam
OPTIMIZERS: dict[str, list[tuple[type[torch.optim.Optimizer], list[str | None]]]] = {
    "one": [(SGD, [None])],
    "one named group": [(SGD, ["head"])],
    "two groups": [(SGD, [None, None])],
    "named groups": [(SGD, ["decay", "no_decay"])],
    "same class": [(ADAM, [None]), (ADAM, [None])],
    "other classes": [(ADAM, [None]), (SGD, [None])],
    "three": [(ADAM, [None]), (SGD, [None, None]), (ADAM, ["body", "head"])],
}


class Manual(L.LightningModule):
    def __init__(self, case: str, *, scheduler: str = "none") -> None:
        super().__init__()
        self.automatic_optimization = False
        self.case, self.scheduler = case, scheduler
        self.net = nn.Linear(4, 3)
        count = sum(len(names) for _, names in OPTIMIZERS[case])
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(count)])

    def configure_optimizers(self) -> Any:
        weights, optimizers = iter(self.weights), []
        for kind, names in OPTIMIZERS[self.case]:
            groups = [
                {"params": [next(weights)], **({} if name is None else {"name": name})}
                for name in names
            ]
            optimizers.append(kind(groups, lr=0.1))
        if self.scheduler == "none":
            return optimizers
        schedulers = [
            {"scheduler": torch.optim.lr_scheduler.ConstantLR(one, factor=1.0), "interval": "step"}
            for one in optimizers
        ]
        if self.scheduler == "named":
            schedulers[0]["name"] = "mine"
        return optimizers, schedulers

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for weight in self.weights:
            weight.grad = torch.ones_like(weight)
        for optimizer in (
            self.optimizers() if len(OPTIMIZERS[self.case]) > 1 else [self.optimizers()]
        ):
            optimizer.step()


def logged(folder: Path, module: L.LightningModule, *callbacks: Any) -> tuple[Any, ...]:
    monitor, logger = LearningRateMonitor(), CSVLogger(folder)
    trainer = L.Trainer(
        **{**QUIET, "logger": logger, "max_epochs": 2, "log_every_n_steps": 1},
        callbacks=[*callbacks, monitor],
    )
    trainer.fit(module, ResumableLoader(8, 2))
    columns = (folder / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0]
    rates = {name: [float(rate) for rate in values] for name, values in monitor.lrs.items()}
    return rates, sorted(name for name in columns.split(",") if name.startswith(("lr-", "mine")))


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_names_and_values_are_those_without_the_package(case: str, tmp_path: Path) -> None:
    scheduler = LearningRateScheduler(Constant())
    bare = logged(tmp_path / "torch", Manual(case, scheduler="torch"))
    assert logged(tmp_path / "ours", Manual(case), scheduler, OptimizationMonitor()) == bare
    assert bare[0]
    assert logged(tmp_path / "none", Manual(case), OptimizationMonitor())[1] == bare[1]


@pytest.mark.parametrize("case", ["one", "named groups", "three"])
def test_names_of_replaced_schedulers_are_kept(case: str, tmp_path: Path) -> None:
    scheduler = LearningRateScheduler(Constant(), module_scheduler="replace")
    bare = logged(tmp_path / "torch", Manual(case, scheduler="named"))
    assert logged(tmp_path / "ours", Manual(case, scheduler="named"), scheduler) == bare
    assert any(name.startswith("mine") for name in bare[0])
