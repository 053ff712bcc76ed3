"""Parameter groups that are added during training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import nn

from lightning_bigopt import (
    HyperparameterScheduler,
    LearningRateScheduler,
    Linear,
)
from tests.helpers import QUIET, Probe, ResumableLoader, loader

DOWN = Linear(start=1.0, end=0.0)


def fit(module: L.LightningModule, *callbacks: Any, ckpt: Any = None, **options: Any) -> L.Trainer:
    trainer = L.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": list(callbacks), **options})
    trainer.fit(module, ResumableLoader(8, 2), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return trainer


class HeadThenBackbone(L.LightningModule):
    """Optimizes its head only, until a callback adds the backbone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.seen: list[list[float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.mse_loss(self.head(self.backbone(batch[0])), batch[1])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.seen.append([float(group["lr"]) for group in optimizer.param_groups])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.head.parameters(), lr=1.0)


def finetuning() -> BackboneFinetuning:
    return BackboneFinetuning(unfreeze_backbone_at_epoch=2, backbone_initial_lr=0.5, verbose=False)


@pytest.mark.parametrize("first", [True, False])
def test_new_group_is_scheduled_from_its_own_lr_in_any_callback_order(
    first: bool,
) -> None:
    module, scheduler = HeadThenBackbone(), LearningRateScheduler(DOWN)
    callbacks = [finetuning(), scheduler] if first else [scheduler, finetuning()]
    fit(module, *callbacks, max_epochs=4)
    assert module.seen[:8] == [[1 - t / 16] for t in range(8)]
    # BackboneFinetuning writes the learning rate of its group when an epoch starts;
    # LearningRateScheduler overwrites it.
    assert module.seen[8:] == [[1 - t / 16, 0.5 * (1 - t / 16)] for t in range(8, 16)]


@pytest.mark.parametrize("base_lr", ["checkpoint", "config"])
@pytest.mark.parametrize("stop", [6, 9, 13])
def test_new_groups_are_scheduled_after_a_resume(tmp_path: Path, stop: int, base_lr: Any) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    straight, resumed = HeadThenBackbone(), HeadThenBackbone()
    fit(
        straight,
        LearningRateScheduler(DOWN),
        finetuning(),
        checkpoint,
        max_epochs=4,
        enable_checkpointing=True,
    )
    fit(
        resumed,
        LearningRateScheduler(DOWN, base_lr=base_lr),
        finetuning(),
        max_epochs=4,
        ckpt=tmp_path / f"step={stop}.ckpt",
    )
    # No weights: on resume Lightning 2.6 leaves the weights of an unfrozen backbone frozen.
    assert resumed.seen == straight.seen[stop:]


class AddsGroupInMidEpoch(L.Callback):
    """Adds a parameter group in the middle of an epoch."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *arguments: Any) -> None:
        if trainer.global_step == 3:
            pl_module.late = torch.nn.Parameter(torch.ones(2))
            trainer.optimizers[0].add_param_group({"params": [pl_module.late], "lr": 0.5})


@pytest.mark.parametrize("first", [True, False])
def test_group_added_in_mid_epoch_is_scheduled_at_its_first_update(first: bool) -> None:
    seen = []

    class Recorder(Probe):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            seen.append([group["lr"] for group in optimizer.param_groups])

    scheduler = LearningRateScheduler(Linear(start=1.0, end=0.0))
    callbacks = [scheduler, AddsGroupInMidEpoch()] if first else [AddsGroupInMidEpoch(), scheduler]
    trainer = L.Trainer(**{**QUIET, "max_steps": 8}, callbacks=callbacks)
    module = Recorder()
    trainer.fit(module, loader(32, 4))
    base = seen[0][0]
    assert seen[:3] == [[base * (1 - t / 8)] for t in range(3)]
    assert seen[3:] == [[base * (1 - t / 8), 0.5 * (1 - t / 8)] for t in range(3, 8)]


def test_hyperparameter_of_a_group_added_in_mid_run_is_scheduled(tmp_path: Path) -> None:
    class Growing(Probe):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net[0].parameters(), lr=0.1, weight_decay=0.4)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers().optimizer
            if self.trainer.global_step == 2 and len(optimizer.param_groups) == 1:
                optimizer.add_param_group({"params": self.net[2].weight, "weight_decay": 0.8})

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            self.seen.append([g["weight_decay"] for g in optimizer.param_groups])

    module = Growing()
    module.seen = []
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(
        module,
        HyperparameterScheduler("weight_decay", DOWN),
        checkpoint,
        enable_checkpointing=True,
        max_steps=8,
    )
    # The module's hook runs after the engine's, so the group is scheduled from the next update on.
    assert module.seen[:2] == [[0.4], [0.4 * (1 - 1 / 8)]]
    assert module.seen[3:] == [[0.4 * (1 - t / 8), 0.8 * (1 - t / 8)] for t in range(3, 8)]
