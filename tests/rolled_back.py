"""Runs with bad samples that roll back, and the runs whose order never held these samples."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_bigopt import (
    BatchSizeScheduler,
    ConstantBatchSize,
    GlobalBatchLoader,
    LearningRateScheduler,
    NonFinite,
    RollBack,
    StepGuard,
    WarmupCosine,
)
from lightning_bigopt.batching.randomness import mixed_seed, permutation
from tests.helpers import QUIET, Regression, cpu_precision

BATCH = 4  # samples of an update


class Ordered(Dataset[Any]):
    """The samples of a data set in a given order, which may repeat some or lack some."""

    def __init__(self, order: Sequence[int], samples: int) -> None:
        self.samples, self.order = Regression(samples), list(order)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor, int]:
        x, y, index = self.samples[self.order[place]]
        return x, y / (index + 1), index


class SavesAndStops(L.Callback):
    """Saves a checkpoint after one batch, and raises after a later one."""

    def __init__(self, path: Path, save: int, stop: int) -> None:
        self.path, self.save, self.stop, self.batches = path, save, stop, 0

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        self.batches += 1
        if self.batches == self.save:
            trainer.save_checkpoint(self.path)
        if self.batches == self.stop:
            raise StopError


class StopError(RuntimeError):
    pass


class Poisoned(L.LightningModule):
    """An MLP whose loss is multiplied for updates with given samples, in given epochs.

    Args:
        bad: Epoch and index in the data set of the bad samples.
        factor: Factor on their losses.
        rank: The only process that is affected; None for all.
    """

    def __init__(
        self,
        bad: Collection[tuple[int, int]] = (),
        *,
        factor: float = math.nan,
        rank: int | None = None,
        optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
        **options: Any,
    ) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 3))
        self.bad, self.factor, self.rank = set(bad), factor, rank
        self.options = {"optimizer": optimizer, "lr": 0.01, **options}
        self.trained: list[tuple[int, list[int]]] = []  # global_step and samples
        self.lrs: list[float] = []

    def configure_optimizers(self) -> Any:
        options = dict(self.options)
        return options.pop("optimizer")(self.parameters(), **options)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, index = batch
        loader: Any = self.trainer.train_dataloader
        epoch = getattr(loader, "epoch", 0)
        self.trained.append((self.trainer.global_step, index.tolist()))
        loss = (self.net(x) - y).square().mean()
        is_here = self.rank in (None, self.global_rank)
        bad = is_here and any((epoch, i) in self.bad for i in index.tolist())
        return loss * self.factor if bad else loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.lrs.append(float(optimizer.param_groups[0]["lr"]))


def order_of(samples: int, epochs: int, *, seed: int = 0) -> list[tuple[int, int]]:
    """Returns epoch and index of all samples in the order of a GlobalBatchLoader."""
    return [
        (epoch, index)
        for epoch in range(epochs)
        for index in permutation(samples, seed=mixed_seed(seed, epoch))
    ]


def guard(**options: Any) -> StepGuard:
    """Rolls back after the second non-finite update in a row, with a snapshot each 5 updates."""
    options = {"snapshot_every": 5, "recover": "2%", **options}
    return StepGuard([NonFinite()], max_consecutive=2, roll_back=RollBack(**options))


def train(
    module: L.LightningModule,
    data: Any,
    *callbacks: Any,
    steps: int = 40,
    precision: str = "32-true",
    micro: int = BATCH,
    ckpt_path: Path | None = None,
    policy: Any = None,
    **options: Any,
) -> L.Trainer:
    """Trains on a data set through a GlobalBatchLoader, or on a loader."""
    L.seed_everything(3, verbose=False)
    own: list[Any] = [LearningRateScheduler(WarmupCosine(warmup="10%"))]
    if isinstance(data, Dataset):
        shuffle = "sequential" if isinstance(data, Ordered) else "permute"
        data = GlobalBatchLoader(data, micro_batch_size=micro, shuffle=shuffle)
    if isinstance(data, GlobalBatchLoader):
        own.append(BatchSizeScheduler(policy or ConstantBatchSize(BATCH)))
    options = {"max_steps": steps, "max_epochs": -1, **options}
    trainer = L.Trainer(
        **{**QUIET, **cpu_precision(precision), "callbacks": [*own, *callbacks], **options}
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


class Plain(Dataset[Any]):
    """The samples of :class:`Ordered` in the order of the data set."""

    def __init__(self, samples: int) -> None:
        self.ordered = Ordered(range(samples), samples)

    def __len__(self) -> int:
        return len(self.ordered)

    def __getitem__(self, index: int) -> Any:
        return self.ordered[index]


def final(module: L.LightningModule, trainer: L.Trainer) -> dict[str, Any]:
    """Returns weights, buffers and optimizer state at the end of a run."""
    (optimizer,) = trainer.optimizers
    states = optimizer.state_dict()["state"]
    found: dict[str, Any] = {n: t.detach().clone() for n, t in module.state_dict().items()}
    for index, state in states.items():
        found |= {f"state {index} {n}": torch.as_tensor(v).clone() for n, v in state.items()}
    return found


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Returns the names of the tensors that are not equal to the bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


class LosesFiles(L.Callback):
    """Deletes files of snapshots of one process, once, before the ninth batch."""

    def __init__(self, folder: Path, *numbers: int, rank: int = 0) -> None:
        self.paths = [folder / f"snapshot-{number:06d}-rank{rank}.pt" for number in numbers]
        self.rank, self.is_done = rank, False

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, index: int) -> None:
        if index != 8 or trainer.global_rank != self.rank or self.is_done:
            return
        self.is_done = True
        for path in self.paths:
            until = time.monotonic() + 30
            while not path.exists() and time.monotonic() < until:
                time.sleep(0.01)  # it is written in the background
            path.unlink()
