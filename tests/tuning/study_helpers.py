"""A small training whose values the tests of a study search."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bigopt import (
    BatchSizeScheduler,
    ConstantBatchSize,
    GlobalBatchLoader,
    GradientClipping,
    LearningRateScheduler,
    NormClip,
    StepGuard,
    WarmupStableDecay,
)
from tests.helpers import QUIET


class Network(L.LightningModule):
    """Two layers on a curve; the final loss depends on every searched value."""

    def __init__(self, lr: float = 0.05, width: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))
        self.lr = lr

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss.detach())
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def samples(count: int, seed: int) -> TensorDataset:
    inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, inputs.sin().sum(dim=1, keepdim=True))


def make_trainer(*more: L.Callback, **options: Any) -> L.Trainer:
    callbacks = [
        LearningRateScheduler(WarmupStableDecay(warmup="10%", decay="20%")),
        GradientClipping(NormClip(max_norm=1.0)),
        BatchSizeScheduler(ConstantBatchSize(8)),
        StepGuard(max_consecutive=3),
        *more,
    ]
    limits = {"max_steps": 24, "val_check_interval": 4}
    return L.Trainer(**{**QUIET, **limits, "callbacks": callbacks, **options})


def make_data() -> Any:
    train = GlobalBatchLoader(samples(64, 0), micro_batch_size=8, seed=5)
    return train, DataLoader(samples(32, 1), batch_size=32)


def plain_run(lr: float, *, seed: int = 0, trainer: L.Trainer | None = None) -> float:
    """Returns the final loss of an ordinary training with one learning rate."""
    L.seed_everything(seed, verbose=False)
    module = Network(lr=lr)
    trainer = trainer or make_trainer()
    train, validation = make_data()
    trainer.fit(module, train, validation)
    return float(trainer.callback_metrics["val_loss"])
