"""The monitor does not synchronize with the device between two logged updates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_bigopt import (
    Constant,
    GradientClipping,
    LearningRateScheduler,
    NormClip,
    OptimizationMonitor,
    PerParameterNormClip,
)
from lightning_bigopt.durations import Progress
from lightning_bigopt.engine.step import StepHooks
from lightning_bigopt.engine.update import Update
from lightning_bigopt.gradients import ClipContext, ClippingRule
from lightning_bigopt.reporting.runs import read_run
from tests.helpers import QUIET, Probe, loader

RULES = pytest.mark.parametrize(
    "rule", [NormClip(), PerParameterNormClip(max_norm=0.5)], ids=lambda rule: type(rule).__name__
)


def fake_update(rule: ClippingRule, device: str = "cuda") -> Update:
    """Returns an update of fake tensors; reading a value of one raises."""
    named = [
        (f"blocks.{index}", nn.Parameter(torch.randn(3, 4, device=device))) for index in range(4)
    ]
    for _, parameter in named:
        parameter.grad = torch.randn_like(parameter)
    update = Update(
        optimizer=torch.optim.AdamW([parameter for _, parameter in named]),
        parameters=named,
        label="",
        progress=Progress(fraction=0.0),
        norm_order=2.0,
        shard_group=None,
        scaler_skips_overflow=False,
        announce_rejection=lambda *_: None,
    )
    context = ClipContext(parameters=named, norms=update.norms)
    update.decision = rule.decide(context, rule.initial_state())
    return update


@RULES
@pytest.mark.parametrize("layers", ["blocks", "parameters", {"all": "*"}])
@pytest.mark.parametrize("logged", [False, True])
def test_observe_and_after_step_read_nothing_from_the_device(
    rule: Any, layers: Any, logged: bool
) -> None:
    monitor = OptimizationMonitor(layers=layers)
    monitor._due, monitor._bar_is_empty = logged, False
    with FakeTensorMode(), torch.no_grad():
        update = fake_update(rule)
        monitor.observe(update)
        monitor.after_step(update)
        assert bool(monitor._values) is logged
        if logged:
            with pytest.raises(DataDependentOutputException):
                monitor._values.fetch()


class NoFloat64(TorchDispatchMode):
    """Fails for float64 tensors on the device "mps", which does not have them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "mps":
                assert tensor.dtype is not torch.float64, func
        return out


@RULES
@pytest.mark.parametrize("layers", ["blocks", "parameters", {"all": "*"}])
def test_no_float64_tensor_is_made_on_a_device_without_float64(rule: Any, layers: Any) -> None:
    monitor = OptimizationMonitor(layers=layers)
    monitor._due = True
    with FakeTensorMode(), NoFloat64(), torch.no_grad():
        update = fake_update(rule, device="mps")
        monitor.observe(update)
        monitor.after_step(update)
        with pytest.raises(DataDependentOutputException):
            monitor._values.fetch()


@pytest.mark.gpu
@RULES
def test_fit_does_not_synchronize_between_logged_updates(
    rule: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every, strict = 10, 0

    def watched(method: Callable[..., None]) -> Callable[..., None]:
        def run(engine: StepHooks, trainer: L.Trainer, *arguments: Any) -> None:
            nonlocal strict
            update = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
            quiet = update > every and update % every != 0
            strict += quiet
            torch.cuda.set_sync_debug_mode("error" if quiet else "default")
            try:
                method(engine, trainer, *arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return run

    for name in ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"):
        monkeypatch.setattr(StepHooks, name, watched(getattr(StepHooks, name)))
    trainer = L.Trainer(
        **{**QUIET, "accelerator": "gpu", "logger": TensorBoardLogger(tmp_path)},
        devices=1,
        max_steps=200,  # ClipStatistics reduces its counts every 64 updates
        callbacks=[
            LearningRateScheduler(Constant()),
            GradientClipping(rule),
            OptimizationMonitor(every=every, layers="parameters"),
        ],
    )
    trainer.fit(Probe(optimizer=torch.optim.AdamW, lr=1e-3, fused=True), loader(64, 4))
    assert strict == 3 * (190 - 19)
    curves = read_run(str(trainer.log_dir)).curves
    assert [step for step, _ in curves["time/step_median"]] == list(range(9, 200, 10))
    for tag in ("time/step_p95", "memory/allocated_peak", "memory/reserved_peak"):
        assert all(value > 0 for _, value in curves[tag][1:]), tag
