"""Modules, data sets and callbacks that the tests of batch sizes share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_bigopt import (
    BatchSizeRamp,
    BatchSizeScheduler,
    BatchSizeSteps,
    GlobalBatchLoader,
    LearningRateScheduler,
    Linear,
)
from tests.helpers import QUIET, Probe, Regression, full, gather


class Tokens(Dataset[dict[str, Tensor]]):
    """Sequences of different lengths, padded to six tokens."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(size, 6, 4, generator=generator)
        self.y = torch.randn(size, 6, 3, generator=generator) * torch.arange(1, size + 1).view(
            -1, 1, 1
        )
        lengths = torch.randint(1, 7, (size,), generator=generator)
        self.mask = torch.arange(6) < lengths.unsqueeze(1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index], "mask": self.mask[index]}


def tokens_of(batch: Any) -> Tensor:
    """Counts the tokens of a batch; config files name this function."""
    return batch["mask"].sum()


def token_mean(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Returns the mean loss over the tokens of a batch."""
    losses = (net(batch["x"].to(next(net.parameters()).dtype)) - batch["y"]).square().mean(-1)
    return (losses * batch["mask"]).sum() / batch["mask"].sum()


class TokenProbe(Probe):
    """Records the error of every gradient against the mean over the tokens of its window."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == getattr(self.trainer.accumulate_grad_batches, "start", batch_idx):
            self.open = []
        self.open.append((batch["x"], batch["y"], batch["mask"]))
        return token_mean(self.net, batch)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        x, y, mask = (gather(torch.cat(parts)) for parts in zip(*self.open, strict=True))
        copy = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        with torch.no_grad():
            for mine, theirs in zip(copy.parameters(), self.net.parameters(), strict=True):
                mine.copy_(full(theirs.detach()))
        loss = token_mean(copy, {"x": x.double(), "y": y.double(), "mask": mask})
        truth = torch.autograd.grad(loss, list(copy.parameters()))
        scale = max(float(t.abs().max()) for t in truth)
        grads = [full(p.grad) for p in self.net.parameters()]
        self.windows.append([int(mask.sum())])
        self.errors.append(
            max(float((g - t).abs().max()) for g, t in zip(grads, truth, strict=True)) / scale
        )


class Recorder(L.LightningModule):
    """A small network that records the samples of every micro-batch."""

    def __init__(self, *, size: int = 37, workers: int = 0, micro: int = 3) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.size, self.workers, self.micro = size, workers, micro
        self.seen: list[list[int]] = []
        self.open: list[int] = []

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        return GlobalBatchLoader(
            Regression(self.size), micro_batch_size=self.micro, num_workers=self.workers, seed=5
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y, index = batch
        window = self.trainer.accumulate_grad_batches
        if batch_idx == getattr(window, "start", batch_idx):
            self.open = []
        self.open += index.tolist()
        return nn.functional.mse_loss(self.net(x), y)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.seen.append(sorted({int(i) for i in gather(torch.tensor(self.open))}))


class KillAtHook(L.Callback):
    """Kills the process with SIGKILL at the n-th call of a hook."""

    def __init__(self, hook: str, number: int) -> None:
        self.left = number
        setattr(self, hook, self._count)

    def _count(self, *args: Any) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)


KILLED_POLICY = {"0%": 5, "30%": 11}


def train_until_killed(folder: Path, hook: str, number: int, workers: int) -> None:
    """Trains a Recorder that saves after every second update, until it is killed."""
    torch.set_num_threads(1)
    checkpoint = ModelCheckpoint(
        folder,
        filename="last",
        every_n_train_steps=2,
        save_top_k=1,
        enable_version_counter=False,
    )
    # KillAtHook comes first: the process dies before the other callbacks run the hook.
    callbacks = [
        KillAtHook(hook, number),
        checkpoint,
        BatchSizeScheduler(BatchSizeSteps(KILLED_POLICY)),
    ]
    options = {**QUIET, "enable_checkpointing": True, "max_epochs": 3, "callbacks": callbacks}
    L.Trainer(**options).fit(Recorder(workers=workers))


class SaveEvery(L.Callback):
    """Saves a checkpoint after every micro-batch, so inside windows too."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.count += 1
        trainer.save_checkpoint(self.folder / f"{self.count}.ckpt")


class Noise(IterableDataset[Tensor]):
    """An endless stream of samples from a normal distribution, different on each process."""

    def __init__(self, *, dimensions: int, rank: int = 0) -> None:
        self.dimensions, self.rank = dimensions, rank

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(100 + self.rank)
        while True:
            yield torch.randn(self.dimensions, generator=generator)


class QuadraticNoise(L.LightningModule):
    """Loss ½ |w - x|² with constant w: the noise is tr Cov(x) = d, the signal is |w|²."""

    dimensions = 40
    value = 0.5
    noise, signal = 40.0, 40 * 0.25

    def __init__(self) -> None:
        super().__init__()
        self.layer = Shift(self.dimensions, self.value)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return 0.5 * self.layer(batch).square().sum(-1).mean()


class Shift(nn.Module):
    """Computes w - x."""

    def __init__(self, dimensions: int, value: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((dimensions,), value))

    def forward(self, x: Tensor) -> Tensor:
        return self.w - x


def noise_loader(batch_size: int, rank: int = 0) -> DataLoader[Tensor]:
    """Returns a loader of Noise for one process."""
    return DataLoader(Noise(dimensions=QuadraticNoise.dimensions, rank=rank), batch_size=batch_size)


RAMP = BatchSizeSteps(
    {
        "0%": 2,
        "1 steps": 4,
        "2 steps": 6,
        "3 steps": 10,
        "4 steps": 8,
        "5 steps": 2,
        "6 steps": 8,
        "7 steps": 4,
        "9 steps": 10,
        "10 steps": 6,
    }
)


class UnsizedStream(IterableDataset[Any]):
    """The samples of Regression as a stream without a length."""

    def __init__(self, size: int) -> None:
        self.data = Regression(size)

    def __iter__(self) -> Any:
        return (self.data[i] for i in range(len(self.data)))


def train_recorder(folder: Path | None = None, *, ckpt: Any = None, **options: Any) -> Recorder:
    """Trains with a ramp of the batch size, a schedule and a scaled learning rate."""
    module = Recorder()
    callbacks: list[Any] = [
        LearningRateScheduler(Linear(start=1.0, end=0.1)),
        BatchSizeScheduler(BatchSizeSteps({"0%": 5, "30%": 11, "70%": 7}), lr_scaling="sqrt"),
        *([] if folder is None else [SaveEvery(folder)]),
    ]
    trainer = L.Trainer(**{**QUIET, "max_epochs": 3, "callbacks": callbacks, **options})
    trainer.fit(module, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return module


class Normalizes(L.LightningModule):
    """A network with layers behind a linear one; counts updates and forward passes."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Linear(4, 6), *layers)
        self.updates = self.forwards = 0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.forwards += 1
        return self.net(batch[0]).square().mean()

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.updates += 1


class TailRecorder(Recorder):
    """A Recorder of epochs of 23 samples, which also records learning rates by torch's hook."""

    def __init__(self, tail: Any) -> None:
        super().__init__(size=23, micro=3)
        self.tail, self.rates, self.starts = tail, [], []

    def on_train_epoch_start(self) -> None:
        self.starts.append(len(self.seen))

    def on_train_end(self) -> None:
        self.starts.append(len(self.seen))

    def train_dataloader(self) -> Any:
        return GlobalBatchLoader(
            Regression(self.size), micro_batch_size=self.micro, seed=5, tail=self.tail
        )

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.register_step_pre_hook(self.record)
        return optimizer

    def record(self, optimizer: Any, *_: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def callbacks_of_tail_recorder() -> list[Any]:
    return [
        LearningRateScheduler(Linear(start=1.0, end=0.1)),
        BatchSizeScheduler(BatchSizeSteps({"0%": 5, "40%": 9}), lr_scaling="sqrt"),
    ]


def train_tail_recorder(tail: str, *callbacks: Any, ckpt: Any = None) -> TailRecorder:
    """Trains three epochs with a step of the batch size."""
    module = TailRecorder(tail)
    callbacks = (*callbacks_of_tail_recorder(), *callbacks)
    trainer = L.Trainer(**{**QUIET, "max_epochs": 3, "callbacks": list(callbacks)})
    trainer.fit(module, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return module


class RecordsRates(L.LightningModule):
    """Records the learning rate of every step, in a hook of torch on the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.rates: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch[0]).square().mean() * 1e-6

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        optimizer.register_step_pre_hook(self.record)
        return optimizer

    def record(self, optimizer: Any, *_: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


class ExactEpochs(RecordsRates):
    """Trains on a GlobalBatchLoader, and records learning rate and samples of every update.

    Args:
        epochs: Samples in each epoch.
        micro: Largest number of samples in a micro-batch.
    """

    def __init__(self, *epochs: int, micro: int = 2) -> None:
        super().__init__()
        self.epochs, self.micro = epochs, micro
        self.sizes: list[int] = []
        self.batch_samples = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.batch_samples += len(batch[0])
        return super().training_step(batch, batch_idx)

    def record(self, optimizer: Any, *_: Any) -> None:
        super().record(optimizer)
        self.sizes.append(self.batch_samples)
        self.batch_samples = 0

    def train_dataloader(self) -> Any:
        return exact_loader(
            self.epochs[min(self.current_epoch, len(self.epochs) - 1)], micro=self.micro
        )


class SaveInEpoch(L.Callback):
    """Saves a checkpoint in a hook, after a number of batches of an epoch: ``at`` has both."""

    def __init__(self, path: Path, hook: str, *, at: tuple[int, int]) -> None:
        def save(trainer: Any, *_: Any) -> None:
            epoch = trainer.fit_loop.epoch_progress.current.ready - 1
            done = trainer.fit_loop.epoch_loop.batch_progress.current.processed
            if (epoch, done) == at:
                trainer.save_checkpoint(path)

        setattr(self, hook, save)


def exact_loader(samples: int, *, micro: int = 2) -> GlobalBatchLoader:
    return GlobalBatchLoader(TensorDataset(torch.randn(samples, 3)), micro_batch_size=micro)


RAMPED = BatchSizeRamp(2, end=8, over="50%", increment=2)


def ramped(*epochs: int) -> tuple[list[float], list[int]]:
    """Returns the learning rates of ``Linear`` and the sizes under ``RAMPED``, by definition."""
    rates, sizes = [], []
    for epoch, length in enumerate(epochs):
        at = 0
        while at < length:
            share = (epoch + at / length) / len(epochs)
            size = min(2 + 2 * int(share * 6 + 1e-9), 8)
            rates.append(1 - share)
            sizes.append(min(size, length - at))
            at += size
    return rates, sizes
