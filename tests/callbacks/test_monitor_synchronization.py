"""Between two logged updates the monitor reads nothing from the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
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
from lightning_bigopt.gradients import ClipContext, ClippingRule, measure
from lightning_bigopt.pipeline import Pipeline
from lightning_bigopt.reporting.runs import read_run
from tests.kit import QUIET, Probe, loader

RULES = pytest.mark.parametrize(
    "rule", [NormClip(), PerParameterNormClip(max_norm=0.5)], ids=lambda rule: type(rule).__name__
)


def a_step(rule: ClippingRule, device: str = "cuda") -> Any:
    """An update of parameters on a device that holds no numbers: to read one raises."""
    named = [
        (f"blocks.{index}", nn.Parameter(torch.randn(3, 4, device=device))) for index in range(4)
    ]
    for _, parameter in named:
        parameter.grad = torch.randn_like(parameter)
    norms = measure(named)
    context = ClipContext(parameters=named, norms=norms)
    return SimpleNamespace(
        pipeline=SimpleNamespace(trainer=SimpleNamespace(strategy=None), shard_group=None),
        optimizer=torch.optim.AdamW([parameter for _, parameter in named]),
        label="",
        skipped=None,
        norms=norms,
        decision=rule.decide(context, rule.initial_state()),
    )


@RULES
@pytest.mark.parametrize("layers", ["blocks", "parameters", {"all": "*"}])
@pytest.mark.parametrize("logged", [False, True])
def test_nothing_is_read_before_it_is_fetched(rule: Any, layers: Any, logged: bool) -> None:
    monitor = OptimizationMonitor(layers=layers).controller
    monitor._due, monitor._bar_is_empty = logged, False
    with FakeTensorMode(), torch.no_grad():
        step = a_step(rule)
        monitor.observe(step)
        for layer in monitor._layers.values():
            layer.after_step(group=None, into=monitor._values)
        assert bool(monitor._values) is logged
        if logged:
            with pytest.raises(DataDependentOutputException):
                monitor._values.fetch()


class NoFloat64(TorchDispatchMode):
    """Refuses what a device of the kind "mps" does not have."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "mps":
                assert tensor.dtype is not torch.float64, func
        return out


@RULES
@pytest.mark.parametrize("layers", ["blocks", "parameters", {"all": "*"}])
def test_a_device_without_float64_is_not_asked_for_it(rule: Any, layers: Any) -> None:
    monitor = OptimizationMonitor(layers=layers).controller
    monitor._due = True
    with FakeTensorMode(), NoFloat64(), torch.no_grad():
        step = a_step(rule, device="mps")
        monitor.observe(step)
        for layer in monitor._layers.values():
            layer.after_step(group=None, into=monitor._values)
        with pytest.raises(DataDependentOutputException):
            monitor._values.fetch()


@pytest.mark.gpu
@RULES
def test_a_fit_does_not_synchronize_between_logged_updates(
    rule: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every, strict = 10, 0

    def watched(method: Callable[..., None]) -> Callable[..., None]:
        def run(pipeline: Pipeline, *arguments: Any) -> None:
            nonlocal strict
            update = pipeline.trainer.fit_loop.epoch_loop._batches_that_stepped + 1
            quiet = update > every and update % every != 0
            strict += quiet
            torch.cuda.set_sync_debug_mode("error" if quiet else "default")
            try:
                method(pipeline, *arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return run

    for name in ("batch_start", "before_step", "batch_end"):
        monkeypatch.setattr(Pipeline, name, watched(getattr(Pipeline, name)))
    trainer = L.Trainer(
        **{**QUIET, "accelerator": "gpu", "logger": TensorBoardLogger(tmp_path)},
        devices=1,
        max_steps=200,  # the audit of clipping puts its counts together every 64
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
