"""A module, a loader and a Trainer for the contract tests, without the package."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.helpers import QUIET


class Small(L.LightningModule):
    """One linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches(count: int = 4) -> DataLoader[Any]:
    """A loader of that many batches of one sample."""
    data: Any = [torch.tensor([float(index)]) for index in range(count)]
    return DataLoader(data, batch_size=1)


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    return L.Trainer(**{**QUIET, "max_steps": 4, **options}, callbacks=list(callbacks))
