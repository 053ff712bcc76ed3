"""Hooks of a user's subclasses, nested callbacks, and callbacks removed during a fit."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import lightning as L
import pytest
import torch

from lightning_bigopt import (
    BatchSizeScheduler,
    ConstantBatchSize,
    GradientClipping,
    LearningRateScheduler,
    Linear,
    NormClip,
    OptimizationMonitor,
    WarmupCosine,
)
from tests.helpers import QUIET, Probe, loader


def three_callbacks() -> list[Any]:
    return [
        LearningRateScheduler(WarmupCosine(warmup="20%")),
        GradientClipping(NormClip(max_norm=1.0)),
        OptimizationMonitor(every=2),
    ]


def fit(callbacks: list[Any], **options: Any) -> tuple[L.Trainer, Probe]:
    module = Probe()
    trainer = L.Trainer(**{**QUIET, "max_steps": 8, **options}, callbacks=callbacks)
    trainer.fit(module, loader(32, 4))
    return trainer, module


class MonitorWithHooks(OptimizationMonitor):
    """A user's subclass with its own hooks."""

    def __init__(self) -> None:
        super().__init__(every=2)
        self.seen: list[str] = []

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append("backward")
        super().on_after_backward(trainer, pl_module)

    def on_train_batch_end(self, *arguments: Any, **options: Any) -> None:
        self.seen.append("end")
        super().on_train_batch_end(*arguments, **options)


@pytest.mark.parametrize("first", [True, False])
def test_hooks_of_a_subclass_run_once_per_batch(first: bool) -> None:
    monitor = MonitorWithHooks()
    others = three_callbacks()[:2]
    fit([monitor, *others] if first else [*others, monitor])
    assert monitor.seen == ["backward", "end"] * 8


class Delegates(L.Callback):
    """Delegates every hook to a callback that the Trainer does not list."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        is_hook = name.startswith("on_") or name in {"setup", "teardown"}
        return getattr(super().__getattribute__("inner"), name) if is_hook else found


def test_callback_nested_in_another_trains_to_the_same_bits() -> None:
    plain = fit(three_callbacks())[1]
    nested = fit([Delegates(callback) for callback in three_callbacks()])[1]
    for one, other in zip(plain.parameters(), nested.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_is_patched_on_callbacks_during_or_after_a_fit(fails: bool) -> None:
    class Fails(L.Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            for callback in callbacks[:3]:
                copied = pickle.loads(pickle.dumps(callback))
                assert callable(copied.on_train_batch_end)
                assert callable(copy.deepcopy(callback).on_before_optimizer_step)
            if fails:
                raise ZeroDivisionError

    callbacks: list[Any] = [*three_callbacks(), Fails()]
    if fails:
        with pytest.raises(ZeroDivisionError):
            fit(callbacks)
    else:
        fit(callbacks)
    for callback in callbacks[:3]:
        assert not [name for name in vars(callback) if name.startswith("on_")]


def monitor_without_super(hook: str) -> OptimizationMonitor:
    """Returns a user's subclass with a hook that does not call ``super``."""
    kind = type("WithoutSuper", (OptimizationMonitor,), {hook: lambda *arguments, **options: None})
    callback: OptimizationMonitor = kind(every=2)
    return callback


@pytest.mark.parametrize(
    "hook",
    [
        "setup",
        "teardown",
        "on_exception",
        "on_fit_start",
        "on_train_start",
        "on_train_epoch_start",
        "on_train_batch_start",
        "on_before_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
        "on_train_epoch_end",
    ],
)
def test_overriding_a_hook_without_super_does_not_change_training(hook: str) -> None:
    seen = []
    for first in (OptimizationMonitor(every=2), monitor_without_super(hook)):
        others = [
            BatchSizeScheduler(ConstantBatchSize(8)),
            GradientClipping(NormClip(max_norm=1e-3)),
            LearningRateScheduler(Linear(start=1.0, end=0.0), budget="24 samples"),
        ]
        module = fit([first, *others], max_steps=-1, max_epochs=1)[1]
        seen.append((module.lrs, module.norms, module.windows))
    assert seen[0] == seen[1]
    assert [len(window) for window in seen[0][2]] == [8, 8, 8]


def test_removing_the_first_callback_keeps_the_others_active() -> None:
    class RemovesFirst(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.callbacks = [c for c in trainer.callbacks if c is not first]

    first = OptimizationMonitor(every=2)
    clipping = GradientClipping(NormClip(max_norm=1e-3))
    module = fit([first, clipping, RemovesFirst()], max_epochs=4, max_steps=16)[1]
    assert len(module.norms) == 16
    assert max(module.norms) < 1.001e-3


def test_callback_works_again_after_a_fit_that_ended_without_cleanup() -> None:
    class Fails(L.Callback):
        def on_train_batch_end(self, *arguments: Any) -> None:
            raise ZeroDivisionError

        def on_exception(self, *arguments: Any) -> None:
            raise ArithmeticError

    clipping = GradientClipping(NormClip(max_norm=1e-3))
    with pytest.raises(ArithmeticError):
        fit([Fails(), LearningRateScheduler(WarmupCosine(warmup="20%")), clipping])
    assert max(fit([clipping])[1].norms) < 1.001e-3
