"""Optimizers whose step is compiled: the same run, and no compilation in every step."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_bigopt import (
    AGC,
    BatchSizeScheduler,
    ConstantBatchSize,
    Cosine,
    GradientClipping,
    GradientNoiseScale,
    HyperparameterScheduler,
    LearningRateScheduler,
    MaxUpdateRatio,
    NonFinite,
    NormClip,
    NormSpike,
    OptimizationMonitor,
    StepGuard,
    UpdateClip,
    ZClip,
)
from tests.bad_batches import BadBatchModule
from tests.helpers import Probe, ResumableLoader, cpu_precision, fit
from tests.repeated_evaluations import OPTIMIZERS, Evaluated, without

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")

CALLBACKS: dict[str, Callable[[], list[L.Callback]]] = {
    "schedule": lambda: [LearningRateScheduler(Cosine())],
    "clip": lambda: [GradientClipping(NormClip(0.5))],
    "adaptive clip": lambda: [GradientClipping(ZClip(warmup=2))],
    "clip units": lambda: [GradientClipping(AGC())],
    "limit ratio": lambda: [GradientClipping(MaxUpdateRatio(0.01))],
    "limit updates": lambda: [GradientClipping(UpdateClip())],
    "guard": lambda: [StepGuard()],
    "noise scale": lambda: [GradientNoiseScale()],
    "monitor": lambda: [OptimizationMonitor(every=1, layers="parameters")],
    "batch size": lambda: [BatchSizeScheduler(ConstantBatchSize(4))],
    "weight decay": lambda: [HyperparameterScheduler("weight_decay", Cosine())],
    "all": lambda: [
        LearningRateScheduler(Cosine()),
        HyperparameterScheduler("weight_decay", Cosine()),
        GradientClipping(NormClip(0.5)),
        StepGuard(),
        GradientNoiseScale(),
        OptimizationMonitor(every=1),
        BatchSizeScheduler(ConstantBatchSize(4)),
    ],
}
SLOW = [name for name in CALLBACKS if name not in {"schedule", "all"}]


class Compiled(Probe):
    """Compiles the step of its optimizer: the method, or a function that calls it."""

    def __init__(self, how: str | None, *, backend: str = "eager", **options: Any) -> None:
        super().__init__(optimizer=torch.optim.AdamW, **options)
        self.how, self.backend = how, backend

    def configure_optimizers(self) -> Any:
        optimizer: Any = super().configure_optimizers()
        if self.how == "method":
            optimizer.step = torch.compile(optimizer.step, backend=self.backend)
        elif self.how == "function":

            @torch.compile(backend=self.backend)
            def step(closure: Any = None) -> Any:
                return type(optimizer).step(optimizer, closure)

            optimizer.step = step
        return optimizer

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Disabled."""


class CompiledBad(BadBatchModule, Compiled):
    """Has bad batches, too."""

    on_before_optimizer_step = BadBatchModule.on_before_optimizer_step


class CompiledEvaluated(Evaluated):
    """SAM with a compiled step."""

    def __init__(self, bad: dict[tuple[int, int], float]) -> None:
        super().__init__(bad, **OPTIMIZERS["SAM"])

    def configure_optimizers(self) -> Any:
        optimizer: Any = super().configure_optimizers()
        optimizer.step = torch.compile(optimizer.step, backend="eager")
        return optimizer


def weights(module: Any) -> list[Tensor]:
    return [parameter.detach() for parameter in module.parameters()]


def assert_close(module: Any, other: Any) -> None:
    # A compiled AdamW computes its bias corrections in another order, also without callbacks.
    torch.testing.assert_close(weights(module), weights(other), rtol=1e-4, atol=2e-5)


def compilations() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def check(name: str, how: str, **options: Any) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module, plain = Compiled(how, **options), Compiled(None)
    for one in (module, plain):
        fit(one, ResumableLoader(48, 2), *CALLBACKS[name](), max_epochs=1)
    assert_close(module, plain)
    assert 1 <= compilations() <= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["schedule", "all"])
def test_run_with_a_compiled_step_equals_the_run_without(name: str) -> None:
    check(name, "method")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "how"), [*((name, "method") for name in SLOW), ("all", "function")]
)
def test_every_callback_beside_a_compiled_step(name: str, how: str) -> None:
    check(name, how)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["schedule", "all"])
def test_step_compiled_by_inductor(name: str) -> None:
    check(name, "method", backend="inductor")


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_skip_of_a_compiled_step_changes_nothing(precision: str) -> None:
    torch._dynamo.reset()
    module = CompiledBad({3: 100.0, 6: 100.0}, how="method", weight_decay=0.5)
    guard = StepGuard([NonFinite(), NormSpike(armed=3, threshold=3.0)])
    fit(module, ResumableLoader(16, 2), guard, max_epochs=1, **cpu_precision(precision))
    assert [rejected.update for rejected in guard.rejections] == [3, 6]
    assert module.changed == [update not in {3, 6} for update in range(8)]


@pytest.mark.slow
def test_compiled_step_that_is_rejected_in_a_repeated_evaluation_is_undone() -> None:
    torch._dynamo.reset()
    bad = {(0, 1): math.nan, (3, 1): math.nan}
    compiled, plain = CompiledEvaluated(bad), Evaluated(**OPTIMIZERS["SAM"])
    fit(compiled, ResumableLoader(12, 2), StepGuard(), max_epochs=1)
    fit(plain, without(12, {0, 3}), max_epochs=1)
    assert_close(compiled, plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all", "limit updates"])
def test_callbacks_beside_a_compiled_module(name: str) -> None:
    torch._dynamo.reset()
    module, plain = Compiled(None), Compiled(None)
    module.net.compile(backend="eager")
    for one in (torch.compile(module, backend="eager"), plain):
        fit(one, ResumableLoader(48, 2), *CALLBACKS[name](), max_epochs=1)
    assert_close(module, plain)
