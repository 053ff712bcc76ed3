"""Checkpoints of version 0.1 resume to the same learning rates and windows.

The checkpoints and ``expected.json``, which holds the values of version 0.1 after a resume, were
written with commit ebbc6c8.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_bigopt import (
    AutoClip,
    BatchSizeScheduler,
    BatchSizeSteps,
    Cosine,
    GlobalBatchLoader,
    GradientClipping,
    HyperparameterScheduler,
    LearningRateScheduler,
    Linear,
    NonFinite,
    NormSpike,
    StepGuard,
    WarmupStableDecay,
    ZClip,
)
from tests.helpers import QUIET, Probe, Regression, ResumableLoader

FOLDER = Path(__file__).parent / "version_0_1"
EXPECTED: dict[str, dict[str, Any]] = json.loads((FOLDER / "expected.json").read_text())


def resume(name: str, module: L.LightningModule, callbacks: list[Any], data: Any) -> None:
    trainer = L.Trainer(**QUIET, max_epochs=3, callbacks=callbacks)
    trainer.fit(module, data, ckpt_path=FOLDER / f"{name}.ckpt", weights_only=True)


def check_weights(module: nn.Module, name: str) -> None:
    sums = [float(parameter.detach().sum()) for parameter in module.parameters()]
    assert sums == pytest.approx(EXPECTED[name]["weights"], rel=1e-5, abs=1e-6)


class WithDecay(Probe):
    def __init__(self) -> None:
        super().__init__(lr=0.05, optimizer=torch.optim.AdamW, weight_decay=0.2)
        self.decays: list[float] = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.decays.append(float(optimizer.param_groups[0]["weight_decay"]))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_ramp_and_guard_resume_inside_a_window(caplog: pytest.LogCaptureFixture) -> None:
    module, name = WithDecay(), "ramp_mid_window"
    guard = StepGuard([NonFinite(), NormSpike(16, armed=4)])
    callbacks = [
        LearningRateScheduler(WarmupStableDecay(warmup="20%", decay="30%")),
        BatchSizeScheduler(BatchSizeSteps({"0%": 2, "50%": 6}), lr_scaling="sqrt"),
        guard,
        GradientClipping(ZClip(warmup=3)),
        HyperparameterScheduler("weight_decay", Linear(start=1.0, end=0.0)),
    ]
    saved = torch.load(FOLDER / f"{name}.ckpt", weights_only=True)["callbacks"]["StepGuard"]
    with caplog.at_level(logging.INFO):
        resume(name, module, callbacks, ResumableLoader(36, 2))
    assert "written inside a window (2 of 3 micro-batches)" in caplog.text
    # Version 0.1 did not save the rule, the detectors and the policy: nothing counts as changed.
    assert "Changes since the checkpoint" not in caplog.text
    assert module.lrs == EXPECTED[name]["learning_rates"]
    assert module.windows == EXPECTED[name]["windows"]
    assert module.decays == EXPECTED[name]["weight_decays"]
    check_weights(module, name)
    history = saved["guarded"][""]["detectors"]["NormSpike"]["accepted"]
    kept = guard.saved_state()["guarded"][""]["detectors"]["NormSpike"]["accepted"]
    assert kept[: 16 - len(module.lrs)] == history[-(16 - len(module.lrs)) :]


class TwoOptimizers(L.LightningModule):
    """TwoOptimizers optimizers under manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.automatic_optimization = False
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)
        self.lrs: list[list[float]] = []

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.a.parameters(), lr=0.1),
            torch.optim.AdamW(self.b.parameters(), lr=0.01),
        ]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        self.lrs.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
        for net, optimizer in zip((self.a, self.b), optimizers, strict=True):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(net(batch[0]), batch[1]))
            optimizer.step()


def test_two_optimizers_resume() -> None:
    module, name = TwoOptimizers(), "two_optimizers"
    callbacks = [
        LearningRateScheduler(Cosine(), optimizers={"AdamW": Linear()}),
        GradientClipping(AutoClip(percentile=50)),
        StepGuard([NonFinite(), NormSpike(16, armed=4)]),
    ]
    resume(name, module, callbacks, ResumableLoader(16, 2))
    assert module.lrs == EXPECTED[name]["learning_rates"]
    check_weights(module, name)


def test_global_batch_loader_resumes() -> None:
    module, name = Probe(lr=0.05), "global_batch_loader"
    callbacks = [
        LearningRateScheduler(Linear()),
        BatchSizeScheduler(BatchSizeSteps({"0%": 3, "50%": 7})),
    ]
    data = GlobalBatchLoader(Regression(25), micro_batch_size=2, seed=3)
    resume(name, module, callbacks, data)
    assert module.lrs == EXPECTED[name]["learning_rates"]
    assert module.windows == EXPECTED[name]["windows"]
    check_weights(module, name)
