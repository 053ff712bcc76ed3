"""Modules and readers of logged curves that the tests of the monitor share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams import plugin_data_pb2
from torch import Tensor, nn

from lightning_bigopt.monitoring.tags import TAGS
from lightning_bigopt.reporting.runs import read_run

MEASURED_TIMES = ("throughput/", "time/", "memory/")
TAG_PREFIXES = tuple({tag.name.split("/")[0] + "/" for tag in TAGS})


class Blocks(L.LightningModule):
    """Blocks with dead units; copies weights and gradients of every update in float64."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(3))
        self.head = nn.Linear(6, 3)
        with torch.no_grad():
            self.blocks[1][0].bias[:3] = -100.0  # dead: zeros in the gradient
        self.options = {"lr": 0.1, **options}
        self.seen: list[dict[str, dict[str, Tensor]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _ = batch
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        loss = nn.functional.mse_loss(self.head(h), y)
        self.log("train_loss", loss)
        return loss

    def on_after_backward(self) -> None:
        copies = {n: p.detach().double().clone() for n, p in self.named_parameters()}
        grads = {n: p.grad.double().clone() for n, p in self.named_parameters()}
        self.seen.append({"before": copies, "grads": grads})

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen[-1]["after"] = {n: p.detach().double() + 0 for n, p in self.named_parameters()}

    def configure_optimizers(self) -> Any:
        kind = self.options.pop("kind", torch.optim.SGD)
        return kind(self.parameters(), **self.options)


def curves(trainer: L.Trainer) -> dict[str, list[tuple[int, float]]]:
    """Reads the curves with the reader of the package."""
    return dict(read_run(trainer.log_dir).curves)


def curves_in_tensorboard(trainer: L.Trainer) -> dict[str, list[tuple[int, float]]]:
    """Reads the curves with TensorBoard's own reader."""
    events = EventAccumulator(trainer.log_dir, size_guidance={"scalars": 0, "tensors": 0}).Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def rows_of(folder: str | Path) -> tuple[list[str], dict[str, Any]]:
    """Returns the names of the metrics and the values of the only row of the HParams tab."""
    kinds = {"_hparams_/experiment": [], "_hparams_/session_start_info": []}
    for file in Path(folder).rglob("events*"):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag in kinds:
                    data = value.metadata.plugin_data.content
                    kinds[value.tag].append(plugin_data_pb2.HParamsPluginData.FromString(data))
    (experiment,), (start,) = kinds.values()
    values = {
        name: getattr(value, value.WhichOneof("kind"))
        for name, value in start.session_start_info.hparams.items()
    }
    return [info.name.tag for info in experiment.experiment.metric_infos], values


def batch_tokens(batch: Any) -> int:
    """Counts ten tokens a sample."""
    return 10 * len(batch[0])


class TwoOptimizers(L.LightningModule):
    """Manual optimization of two layers, each with its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y, _ = batch
        for optimizer, layer in zip(self.optimizers(), (self.one, self.two), strict=True):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(layer(x), y))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return (
            torch.optim.SGD(self.one.parameters(), lr=0.1),
            torch.optim.AdamW(self.two.parameters(), lr=0.01),
        )


def total_norm(tensors: list[Tensor]) -> float:
    """Returns the norm of all entries."""
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))
