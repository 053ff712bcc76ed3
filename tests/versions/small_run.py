"""A run of twelve updates with the README's callbacks, and the same run as a plain loop of torch.

The functions take the package of the Trainer, ``lightning.pytorch`` or one with the same names.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_bigopt import (
    BatchSizePolicyMixin,
    BatchSizeScheduler,
    BatchSizeSteps,
    GradientClipping,
    GradientClippingMixin,
    LearningRateScheduleMixin,
    LearningRateScheduler,
    NormClip,
    OptimizationMonitor,
    OptimizationMonitorMixin,
    WarmupStableDecay,
)

UPDATES, SAMPLES = 12, 64
SCHEDULE = WarmupStableDecay(warmup="25%", decay="25%")
POLICY = BatchSizeSteps({"0%": 4, "50%": 8})
RULE = NormClip(max_norm=0.5)
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_steps": UPDATES,
    "log_every_n_steps": 1,
}


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 4, generator=generator)
    return x, 3 * torch.randn(SAMPLES, 3, generator=generator)


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*samples()), batch_size=2)


def loader_of_rank(rank: int) -> DataLoader[Any]:
    """Returns every second sample, one by one: two processes together train on the same windows."""
    data = TensorDataset(*samples())
    return DataLoader(data, sampler=DistributedSampler(data, 2, rank, shuffle=False))


class ResumableLoader:
    """The same batches of two, with a saved position."""

    batch_size = 2

    def __init__(self) -> None:
        self.batches, self.position = list(loader()), 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        start, self.position = self.position, 0
        for batch in range(start, len(self)):
            self.position = (batch + 1) % len(self)
            yield self.batches[batch]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def network() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.9)


class Plain(NamedTuple):
    """What the plain loop used."""

    weights: list[Tensor]
    rates: list[float]
    norms: list[float]
    sizes: list[int]


def plain_run() -> Plain:
    """Trains with torch alone: warm-up, plateau, 1-sqrt cooldown, one global norm, two sizes."""
    net, (x, y) = network(), samples()
    opt, first = optimizer(net.parameters()), 0
    rates, norms, sizes = [], [], []
    for update in range(UPDATES):
        fraction = update / UPDATES
        warm = min(1.0, fraction / 0.25)
        cool = 1 - math.sqrt(max(0.0, fraction - 0.75) / 0.25)
        size = 8 if fraction >= 0.5 else 4
        rates.append(0.2 * warm * cool * math.sqrt(size / 4))
        sizes.append(size)
        opt.param_groups[0]["lr"] = rates[-1]
        rows = [(first + i) % SAMPLES for i in range(size)]
        first += size
        opt.zero_grad()
        nn.functional.mse_loss(net(x[rows]), y[rows]).backward()
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), 0.5)))
        opt.step()
    return Plain([p.detach().clone() for p in net.parameters()], rates, norms, sizes)


def callbacks() -> list[Any]:
    return [
        LearningRateScheduler(SCHEDULE),
        GradientClipping(RULE),
        BatchSizeScheduler(POLICY, lr_scaling="sqrt"),
        OptimizationMonitor(),
    ]


def module_of(pl: ModuleType, *mixins: type) -> Any:
    """Returns a module that records the learning rate of every update."""

    class Small(*mixins, pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.rates: list[float] = []

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer(self.parameters())

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            self.rates.append(float(optimizer.param_groups[0]["lr"]))

    return Small()


class OwnSettings(
    LearningRateScheduleMixin,
    GradientClippingMixin,
    BatchSizePolicyMixin,
    OptimizationMonitorMixin,
):
    """The same settings as mixins of a module."""

    def configure_learning_rate_schedule(self) -> WarmupStableDecay:
        return SCHEDULE

    def configure_clipping_rule(self) -> NormClip:
        return RULE

    def configure_batch_size_policy(self) -> BatchSizeScheduler:
        return BatchSizeScheduler(POLICY, lr_scaling="sqrt")


def weights_of(module: Any) -> list[Tensor]:
    return [parameter.detach() for parameter in module.net.parameters()]


def main() -> None:
    """Trains on one process of two and writes its weights and learning rates."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    pl, out = import_module(sys.argv[1]), Path(sys.argv[2])
    module = module_of(pl)
    trainer = pl.Trainer(**QUIET, strategy="ddp", devices=2, callbacks=callbacks())
    trainer.fit(module, loader_of_rank(int(os.environ["RANK"])))
    found = {"rates": module.rates, "weights": [w.tolist() for w in weights_of(module)]}
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
