"""Steps for which Lightning does not call on_before_optimizer_step: manual and own steps."""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bigopt import (
    GradientClipping,
    HyperparameterScheduler,
    LearningRateScheduler,
    Linear,
    NormClip,
    OptimizationMonitor,
    StepGuard,
)
from tests.helpers import QUIET


class IgnoresClosure(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()


class Manual(L.LightningModule):
    """Two optimizers, stepped in one of several ways."""

    def __init__(self, way: str, kind: type[torch.optim.SGD] = torch.optim.SGD) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.way, self.kind = way, kind
        self.rates: list[float] = []

    def configure_optimizers(self) -> Any:
        return [self.kind(net.parameters(), lr=1.0, momentum=0.5) for net in (self.a, self.b)]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        for number, (net, wrapped) in enumerate(
            zip((self.a, self.b), self.optimizers(), strict=True)
        ):
            plain = wrapped.optimizer
            wrapped.zero_grad()
            self.manual_backward(net(batch).square().mean())
            if self.way == "wrapped" or (self.way == "second plain" and not number):
                wrapped.step()
            elif self.way == "closure":
                wrapped.step(closure=lambda: None)
            elif self.way == "class":
                type(plain).step(plain)
            else:
                plain.step()


class OwnStep(L.LightningModule):
    """Automatic optimization that does not call Lightning's step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)
        self.rates: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])
        optimizer.optimizer.step(closure=optimizer_closure)


def data() -> DataLoader[Any]:
    rows: Any = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    return DataLoader(rows, batch_size=2)


def fit(module: Any, *callbacks: Any, **options: Any) -> L.Trainer:
    trainer = L.Trainer(**{**QUIET, "max_epochs": 2, **options}, callbacks=list(callbacks))
    trainer.fit(module, data())
    return trainer


def equal(one: L.LightningModule, other: L.LightningModule) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("kind", [torch.optim.SGD, IgnoresClosure])
@pytest.mark.parametrize("way", ["wrapped", "closure"])
def test_every_way_through_lightning_is_clipped(way: str, kind: Any) -> None:
    module, plain = Manual(way, kind), Manual(way, kind)
    fit(module, GradientClipping(NormClip(1e-3)), StepGuard(), max_epochs=1)
    for net in (plain.a, plain.b):
        optimizer = kind(net.parameters(), lr=1.0, momentum=0.5)
        for batch in data():
            optimizer.zero_grad()
            net(batch).square().mean().backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
            optimizer.step()
    for mine, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("way", ["plain", "class", "second plain"])
@pytest.mark.parametrize("callback", [GradientClipping(NormClip(1e-3)), StepGuard()])
def test_clipping_and_guard_refuse_a_step_that_they_do_not_see(way: str, callback: Any) -> None:
    message = (
        r"on_before_optimizer_step must be called for every update with "
        rf"{type(callback).__name__}\(.*got a step of SGD without it .*; step the optimizers of "
        r"self\.optimizers\(\) and not their \.optimizer"
    )
    with pytest.raises(RuntimeError, match=message):
        fit(Manual(way), callback)


def test_schedulers_and_monitor_do_not_need_the_hook() -> None:
    """Under max_epochs the schedule counts batches and not the steps of the optimizers."""
    module = Manual("plain")
    schedulers = LearningRateScheduler(Linear()), HyperparameterScheduler("momentum", Linear())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(module, *schedulers)
    assert module.rates == [1 - t / 8 for t in range(8)]
    watched, bare = Manual("plain"), Manual("plain")
    with pytest.warns(UserWarning, match="OptimizationMonitor.* does not see every update") as seen:
        fit(watched, OptimizationMonitor())
    assert sum("does not see every update" in str(one.message) for one in seen) == 1
    fit(bare)
    assert equal(watched, bare)


def test_budget_in_updates_refuses_steps_that_lightning_does_not_count() -> None:
    """``global_step`` stays 0, so that the learning rate would never change."""
    with pytest.raises(
        RuntimeError, match=r"budget in steps .* got a step of SGD .* max_epochs instead"
    ):
        fit(Manual("plain"), LearningRateScheduler(Linear()), max_steps=4)


def test_own_step_of_an_automatic_module() -> None:
    module, bare = OwnStep(), OwnStep()
    fit(module, LearningRateScheduler(Linear()), max_steps=4)
    assert module.rates == [1 - t / 4 for t in range(4)]
    watched = OwnStep()
    with pytest.warns(UserWarning, match="OptimizationMonitor.* does not see every update"):
        fit(watched, OptimizationMonitor())
    fit(bare)
    assert equal(watched, bare)
    with pytest.raises(RuntimeError, match=r"call super\(\) in overridden hooks"):
        fit(OwnStep(), GradientClipping(NormClip(1.0)))


def test_replaced_step_of_a_class_is_called_as_without_the_package() -> None:
    """A user replaces ``step`` of the class in mid-run; closures are not evaluated by it."""
    calls: list[int] = []

    class Replaces(L.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                patch.start()

    patch = mock.patch.object(
        IgnoresClosure, "step", lambda self, closure=None: calls.append(self.param_groups[0]["lr"])
    )
    scheduler = LearningRateScheduler(Linear())
    try:
        fit(Manual("wrapped", IgnoresClosure), scheduler, OptimizationMonitor(), Replaces())
    finally:
        patch.stop()
    assert calls == [1 - t / 8 for t in range(4, 8) for _ in range(2)]


def test_hooks_on_the_optimizers_are_removed() -> None:
    trainer = fit(Manual("wrapped"), GradientClipping(NormClip(1.0)), StepGuard())
    for optimizer in trainer.optimizers:
        assert not optimizer._optimizer_step_post_hooks
