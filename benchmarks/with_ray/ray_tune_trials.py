"""Searches over fields of the callbacks with Ray Tune, two trials at a time.

``train`` is what a trial runs. Called without Tune, it trains the same configuration to the end:
the run that a trial is compared with.
"""

from __future__ import annotations

import json
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from ray import tune
from ray.tune.integration.pytorch_lightning import TuneReportCheckpointCallback
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
from torch import Tensor, nn

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    GlobalBatchLoader,
    GradientClipping,
    LearningRateScheduler,
    NormClip,
    OptimizationMonitor,
    StepGuard,
    WarmupStableDecay,
)
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.update import Update
from tests.helpers import QUIET, Regression, loader

UPDATES = 40
EVERY = 5  # batches between two validations, each of which reports to Tune


class RecordsUpdates(Capability):
    """Appends what each update uses to a file: base and learning rate, norm, clip coefficient."""

    owns = "records"
    rank = 95
    path: Path
    base_lr: float

    def needs_norms(self, update: Update) -> bool:
        return True

    def observe(self, update: Update) -> None:
        assert self.fit is not None
        trainer, decision = self.fit.trainer, update.decision
        record = [
            trainer.global_step,
            self.base_lr,
            repr(trainer.optimizers[0].param_groups[0]["lr"]),
            repr(float(update.norms.total)),
            None if decision is None else repr(float(decision.coefficient)),
        ]
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


class Searched(L.LightningModule):
    """A small network; its learning rate is a field of the search."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.lr = lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y, index = batch
        return nn.functional.mse_loss(self.net(x), y / (index + 1).unsqueeze(1))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class ExitsOnce(L.Callback):
    """Kills this process before an update, once."""

    def __init__(self, mark: Path, update: int) -> None:
        self.mark, self.update = mark, update

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.update and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def train(
    config: dict[str, Any], path: Path, *more: L.Callback, checkpoint: str | None = None
) -> Searched:
    """Trains one configuration, and records every update in ``path``."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    module = Searched(config["lr"])
    records = RecordsUpdates()
    records.path, records.base_lr = path, config["lr"]
    trainer = L.Trainer(
        **QUIET,
        max_steps=UPDATES,
        val_check_interval=EVERY,
        check_val_every_n_epoch=None,
        callbacks=[
            LearningRateScheduler(
                WarmupStableDecay(warmup=config["warmup"], decay=config["decay"]),
                base_lr="config",
            ),
            GradientClipping(NormClip(max_norm=config["max_norm"])),
            StepGuard(),
            BatchSizeScheduler(BatchSizeSteps({"0%": 4, "50%": config["batch"]})),
            OptimizationMonitor(),
            records,
            *more,
        ],
    )
    data = GlobalBatchLoader(Regression(64), micro_batch_size=4, seed=3)
    trainer.fit(module, data, loader(32, 8), ckpt_path=checkpoint, weights_only=False)
    return module


def trial(config: dict[str, Any]) -> None:
    """Trains a trial of Tune, from its newest checkpoint if it has one."""
    folder = Path(config["folder"])
    name = tune.get_context().get_trial_id()
    (folder / f"{name}.json").write_text(json.dumps(config))
    more: list[L.Callback] = [
        TuneReportCheckpointCallback({"loss": "val_loss"}, filename="state.ckpt")
    ]
    if "killed_at" in config:
        more.append(ExitsOnce(folder / f"{name}.killed", config["killed_at"]))
    checkpoint = tune.get_checkpoint()
    records = folder / f"{name}.jsonl"
    if checkpoint is None:
        module = train(config, records, *more)
    else:
        with checkpoint.as_directory() as state:
            module = train(config, records, *more, checkpoint=str(Path(state) / "state.ckpt"))
    torch.save(module.state_dict(), folder / f"{name}.pt")


def search(folder: Path, name: str, *, space: dict[str, Any], **options: Any) -> tune.ResultGrid:
    """Runs a search with two trials at a time."""
    folder.mkdir(parents=True)
    resources = tune.with_resources(trial, {"cpu": 1})
    return tune.Tuner(
        resources,
        param_space={"folder": str(folder), **space},
        tune_config=tune.TuneConfig(metric="loss", mode="min", max_concurrent_trials=2, **options),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(folder / "storage"),
            failure_config=tune.FailureConfig(max_failures=1),
            verbose=0,
        ),
    ).fit()


SPACE: dict[str, Any] = {
    "lr": tune.grid_search([0.003, 0.01, 0.03, 0.1]),
    "max_norm": tune.grid_search([0.3, 1.0]),
    "warmup": "10%",
    "decay": tune.sample_from(lambda config: "20%" if config["lr"] < 0.02 else "50%"),
    "batch": 8,
}


def asha(folder: Path) -> tune.ResultGrid:
    """Eight trials, of which ASHA stops the worse ones."""
    scheduler = ASHAScheduler(max_t=UPDATES // EVERY, grace_period=2, reduction_factor=2)
    return search(folder, "asha", space=SPACE, scheduler=scheduler)


def killed(folder: Path) -> tune.ResultGrid:
    """Two trials, whose processes are killed and started again from their checkpoints."""
    space = {"lr": tune.grid_search([0.01, 0.03]), "killed_at": 23}
    fixed = {"max_norm": 0.3, "warmup": "10%", "decay": "20%", "batch": 8}
    return search(folder, "killed", space={**space, **fixed})


def population(folder: Path) -> tune.ResultGrid:
    """Population-based training: a bad trial takes checkpoint and values of a good one."""
    scheduler = PopulationBasedTraining(
        time_attr="training_iteration",
        perturbation_interval=4,
        hyperparam_mutations={"lr": [1e-5, 0.001, 0.01, 0.03]},
        quantile_fraction=0.5,
        resample_probability=0.5,
        synch=True,
    )
    space = {"lr": tune.grid_search([1e-5, 0.01])}
    fixed = {"max_norm": 0.3, "warmup": "10%", "decay": "20%", "batch": 8}
    return search(folder, "population", space={**space, **fixed}, scheduler=scheduler)
