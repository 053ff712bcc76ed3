"""A small regression trained by a Trainer, and the same training as a plain loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.contracts.catalog import Entry

__all__ = ["BATCH", "Batches", "Module", "fit", "loop", "network", "seed_"]

SAMPLES, BATCH = 48, 8


def seed_(number: int) -> None:
    """Seeds what optimizers draw random numbers from."""
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002 - the generator that optimizers use


def network() -> nn.Module:
    """Makes a network with a weight of 4096 elements, from which on low-bit states are used."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)
    )


def samples() -> Tensor:
    """Returns inputs, targets and the index of all samples, of shape ``(samples, 13)``."""
    x = torch.randn(SAMPLES, 8, generator=torch.Generator().manual_seed(1))
    return torch.cat([x, x[:, :4].roll(1, 1) + x[:, 4:], torch.arange(SAMPLES)[:, None]], 1)


def loss_of(net: nn.Module, batch: Tensor) -> Tensor:
    """Returns the loss; seeds the random numbers of the step, equally on all processes."""
    seed_(int(batch[0, -1]) // BATCH)
    return nn.functional.mse_loss(net(batch[:, :8]), batch[:, 8:12])


class Batches:
    """A loader in a fixed order that saves its position."""

    def __init__(self, size: int = BATCH, part: tuple[int, int] = (0, 1)) -> None:
        self.batch_size, self.part = size, part
        self._position = 0

    def __len__(self) -> int:
        return SAMPLES // self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        start, self._position = self._position, 0
        for index in range(start, len(self)):
            self._position = (index + 1) % len(self)
            batch = samples()[index * self.batch_size : (index + 1) * self.batch_size]
            yield batch.chunk(self.part[1])[self.part[0]]

    def state_dict(self) -> dict[str, int]:
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._position = state["position"]


class Module(L.LightningModule):
    """The regression; records the learning rate and the largest relative update of each step."""

    def __init__(self, entry: Entry) -> None:
        super().__init__()
        self.entry, self.net = entry, network()
        self.automatic_optimization = not entry.is_manual
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.ratios: list[float] = []
        self.before: list[Tensor] = []

    def configure_optimizers(self) -> Any:
        return self.entry.build(self.net)

    def backward(self, loss: Tensor) -> None:
        loss.backward(create_graph=self.entry.second_order)  # type: ignore[no-untyped-call]

    def training_step(self, batch: Tensor) -> Tensor | None:
        if self.automatic_optimization:
            return self.loss(batch)
        optimizer: Any = self.optimizers()

        def closure() -> Tensor:
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        closure()
        optimizer.step(closure)
        return None

    def loss(self, batch: Tensor) -> Tensor:
        loss = loss_of(self.net, batch)
        self.losses.append(float(loss.detach()))
        return loss

    def on_train_start(self) -> None:
        train_mode(self.trainer.optimizers[0])

    def on_train_end(self) -> None:
        evaluation_mode(self.trainer.optimizers[0])

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self.rates.append(float(self.trainer.optimizers[0].param_groups[0]["lr"]))
        self.before = [p.detach().clone() for p in self.net.parameters()]

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        pairs = zip(self.net.parameters(), self.before, strict=True)
        ratios = [float((p.detach() - b).norm() / b.norm().clamp(min=1e-3)) for p, b in pairs]
        self.ratios.append(max(ratios))


def train_mode(optimizer: Any) -> None:
    """Switches an optimizer of schedulefree to the weights of training."""
    if "train_mode" in optimizer.param_groups[0]:
        optimizer.train()


def evaluation_mode(optimizer: Any) -> None:
    """Switches an optimizer of schedulefree to the weights of evaluation, as after a fit."""
    if "train_mode" in optimizer.param_groups[0]:
        optimizer.eval()


def fit(entry: Entry, *callbacks: L.Callback, **options: Any) -> Module:
    """Trains with a Trainer; ``data``, ``ckpt_path`` and further arguments of the Trainer."""
    data, ckpt_path = options.pop("data", None), options.pop("ckpt_path", None)
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": 12,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    module = Module(entry)
    trainer = L.Trainer(callbacks=list(callbacks), **{**defaults, **options})
    trainer.fit(module, Batches() if data is None else data, ckpt_path=ckpt_path)
    return module


def loop(
    entry: Entry,
    *,
    factor: Callable[[int], float] | None = None,
    max_norm: float | None = None,
    bfloat16: bool = False,
    steps: int = 12,
) -> Module:
    """Trains in a plain loop; learning rates are written and gradients clipped by hand."""
    module = Module(entry)
    net = module.net
    optimizer = entry.build(net)
    train_mode(optimizer)
    bases = [float(group["lr"]) for group in optimizer.param_groups]
    data = DataLoader(samples(), BATCH)
    for step in range(steps):
        batch = list(data)[step % len(data)]
        for group, base in zip(optimizer.param_groups, bases, strict=True):
            if factor is not None and isinstance(group["lr"], Tensor):
                group["lr"] = group["lr"].clone().fill_(base * factor(step))
            elif factor is not None:
                group["lr"] = base * factor(step)
        module.rates.append(float(optimizer.param_groups[0]["lr"]))

        def closure(batch: Tensor = batch) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext():
                loss = loss_of(net, batch)
            module.losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward(create_graph=entry.second_order)  # type: ignore[no-untyped-call]
            if max_norm is not None:
                nn.utils.clip_grad_norm_(net.parameters(), max_norm)
            return loss

        if entry.is_manual:
            closure()
        optimizer.step(closure)
    evaluation_mode(optimizer)
    return module


def difference(one: Module, other: Module) -> float:
    """Returns the largest difference of weights, relative to the largest weight of the tensor."""
    found = 0.0
    for a, b in zip(one.net.parameters(), other.net.parameters(), strict=True):
        size = float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1e-3))
        found = size if math.isnan(size) else max(found, size)
    return found


class SaveAt(L.Callback):
    """Saves a checkpoint after an update."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)
