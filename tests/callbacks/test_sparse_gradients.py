"""Sparse gradients of an embedding: every callback acts as on the dense ones of the same run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bigopt import (
    AGC,
    BatchSizeScheduler,
    BatchSizeSteps,
    ClipToMedian,
    GradientClipping,
    GradientNoiseScale,
    NonFinite,
    NormClip,
    NormSpike,
    OptimizationMonitor,
    StepGuard,
)
from lightning_bigopt.reporting.runs import read_run
from tests.helpers import QUIET


class Words(L.LightningModule):
    """A table and a layer; with a guard two batches have a bad loss."""

    def __init__(self, *, sparse: bool, bad: bool = False) -> None:
        super().__init__()
        self.bad = {6: math.nan, 10: 1000.0} if bad else {}
        torch.manual_seed(1)
        self.table = nn.Embedding(20, 4, sparse=sparse)
        self.head = nn.Linear(4, 2)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        factor = self.bad.get(self.trainer.global_step, 1.0)
        return self.head(self.table(batch[0]).mean(1)).square().mean() * factor


def data() -> Any:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(20, (32, 5), generator=generator)
    return DataLoader(TensorDataset(words), batch_size=2)


def guard() -> StepGuard:
    return StepGuard([NonFinite(), NormSpike(armed=3)], actions=[ClipToMedian()])


@pytest.mark.parametrize(
    "build",
    [
        lambda: [guard()],
        lambda: [GradientClipping(NormClip(max_norm=0.02)), guard()],
        lambda: [BatchSizeScheduler(BatchSizeSteps({"0%": 2, "30%": 6})), GradientNoiseScale()],
    ],
    ids=["guard", "clipping and guard", "batches and noise scale"],
)
def test_run_equals_that_with_dense_gradients(build: Any, tmp_path: Path) -> None:
    weights, curves, histograms = [], [], []
    for sparse in (True, False):
        callbacks = build()
        bad = any(isinstance(callback, StepGuard) for callback in callbacks)
        module, logger = Words(sparse=sparse, bad=bad), TensorBoardLogger(tmp_path, str(sparse))
        monitor = OptimizationMonitor(every=1, layers="parameters", histograms_every=4)
        options: dict[str, Any] = {**QUIET, "logger": logger, "max_epochs": 1}
        L.Trainer(**options, callbacks=[monitor, *callbacks]).fit(module, data())
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
        curves.append(read_run(logger.log_dir).curves)
        events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0})
        events.Reload()
        found = events.Histograms("histograms/grad/table.weight")
        histograms.append([(one.step, one.histogram_value.num) for one in found])
    torch.testing.assert_close(weights[0], weights[1])
    assert curves[0].keys() == curves[1].keys()
    assert "layers/zeros/table.weight" in curves[0]
    for tag, curve in curves[0].items():
        if tag.startswith(("grad_norm", "layers", "clip", "guard", "noise_scale")):
            truth = curves[1][tag]
            assert [step for step, _ in curve] == [step for step, _ in truth]
            expected = pytest.approx([v for _, v in truth], rel=1e-4, abs=1e-7, nan_ok=True)
            assert [value for _, value in curve] == expected, tag
    assert histograms[0] == histograms[1]
    assert histograms[0][0][1] == 80


def test_rule_that_reads_whole_units_refuses_them() -> None:
    module = Words(sparse=True)
    with pytest.raises(ValueError, match=r"the gradient of table\.weight must be dense"):
        L.Trainer(**QUIET, max_epochs=1, callbacks=[GradientClipping(AGC())]).fit(module, data())
