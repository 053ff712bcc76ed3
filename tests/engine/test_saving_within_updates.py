"""Checkpoints that are saved while an update is performed warn if a resume would differ."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    ConstantBatchSize,
    GlobalBatchLoader,
    GradientClipping,
    GradientNoiseScale,
    HyperparameterScheduler,
    LearningRateScheduler,
    Linear,
    OptimizationMonitor,
    StepGuard,
    ZClip,
)
from tests.helpers import QUIET, Probe, Regression

AT = 5  # the update in which the checkpoint is saved
WARNING = "A checkpoint is saved during an update"


class SavesBeforeStep(L.Callback):
    """Saves in one of the calls of the hook during one update."""

    def __init__(self, path: Path, *, call: int = 1) -> None:
        self.path, self.call, self.calls = path, call, 0

    def on_before_optimizer_step(self, trainer: Any, *arguments: Any) -> None:
        self.calls += trainer.global_step == AT
        if trainer.global_step == AT and self.calls == self.call:
            trainer.save_checkpoint(self.path)


def capabilities() -> list[Any]:
    return [
        LearningRateScheduler(Linear(start=1.0, end=0.0)),
        HyperparameterScheduler("weight_decay", Linear(start=1.0, end=0.5)),
        BatchSizeScheduler(BatchSizeSteps({"0%": 2, "50%": 5}), lr_scaling="sqrt"),
        OptimizationMonitor(),
    ]


def fit(callbacks: list[Any], module: Probe | None = None, **resume: Any) -> Probe:
    data = GlobalBatchLoader(Regression(23), micro_batch_size=2, seed=1)
    module = Probe(optimizer=torch.optim.AdamW) if module is None else module
    L.Trainer(**{**QUIET, "max_epochs": 2}, callbacks=callbacks).fit(module, data, **resume)
    return module


def test_checkpoint_before_the_step_is_exact_if_nothing_was_decided(tmp_path: Path) -> None:
    saves = SavesBeforeStep(tmp_path / "saved.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=WARNING)
        first = fit([*capabilities(), saves])
    resumed = fit(capabilities(), ckpt_path=saves.path, weights_only=True)
    assert (resumed.lrs, resumed.windows) == (first.lrs[AT:], first.windows[AT:])
    assert resumed.norms == first.norms[AT:]
    for one, other in zip(first.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "capability", [GradientClipping(ZClip()), StepGuard(), GradientNoiseScale()], ids=repr
)
def test_checkpoint_before_the_step_warns_after_a_decision(tmp_path: Path, capability: Any) -> None:
    saves = SavesBeforeStep(tmp_path / "saved.ckpt")
    with pytest.warns(UserWarning, match=WARNING):
        fit([*capabilities(), capability, saves])


class PerturbsWeights(torch.optim.SGD):
    """Evaluates its closure twice, the second time with other weights, as SAM does."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(1.0)
        return super().step(closure)


class SavesAfterStep(Probe):
    """Saves when the optimizer has stepped, before Lightning counts the update."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        if self.trainer.global_step == AT:
            self.trainer.save_checkpoint(self.path)


class Perturbed(Probe):
    def __init__(self) -> None:
        super().__init__(optimizer=PerturbsWeights)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Records nothing: the window is evaluated twice."""


def schedule() -> list[Any]:
    return [LearningRateScheduler(Linear()), BatchSizeScheduler(ConstantBatchSize(2))]


def test_checkpoint_after_the_step_warns_also_with_a_schedule_alone(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=WARNING):
        fit(schedule(), SavesAfterStep(tmp_path / "saved.ckpt"))


def test_checkpoint_in_a_second_evaluation_warns_also_with_a_schedule_alone(tmp_path: Path) -> None:
    saves = SavesBeforeStep(tmp_path / "saved.ckpt", call=2)
    with pytest.warns(UserWarning, match=WARNING):
        fit([*schedule(), saves], Perturbed())


def test_checkpoint_after_the_update_does_not_warn(tmp_path: Path) -> None:
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            trainer.save_checkpoint(tmp_path / "saved.ckpt")

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=WARNING)
        fit([GradientClipping(ZClip()), StepGuard(), *capabilities(), Saves()])
