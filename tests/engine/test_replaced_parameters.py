"""Parameters that are replaced during a run: resized, re-initialized, moved, or only in part."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_bigopt import (
    AdaGC,
    GradientClipping,
    Groups,
    LearningRateScheduler,
    Linear,
    NonFinite,
    NormClip,
    OptimizationMonitor,
    StepGuard,
)
from lightning_bigopt.reporting.runs import read_run
from tests.bad_batches import BadBatchModule
from tests.helpers import QUIET, Probe, loader

REPLACED = 3  # the update after which a parameter is replaced


def replacement(old: nn.Parameter, factor: float = 1.0) -> nn.Parameter:
    return nn.Parameter(old.detach().clone() * factor)


def in_place(module: Probe, optimizer: Any) -> None:
    """The second weight, set at its place in the list of the group."""
    old = module.net[2].weight
    module.net[2].weight = replacement(old)
    members = optimizer.param_groups[0]["params"]
    members[[id(p) for p in members].index(id(old))] = module.net[2].weight


def new_list(module: Probe, optimizer: Any) -> None:
    """All parameters, as Gaussian splatting does when it splits and removes points."""
    for layer in (module.net[0], module.net[2]):
        layer.weight, layer.bias = replacement(layer.weight), replacement(layer.bias)
    optimizer.param_groups[0]["params"] = list(module.net.parameters())


def resized(module: Probe, optimizer: Any) -> None:
    """A hidden layer with one more unit."""
    torch.manual_seed(3)
    module.net[0], module.net[2] = nn.Linear(4, 6), nn.Linear(6, 3)
    optimizer.param_groups[0]["params"] = list(module.net.parameters())


def moved(module: Probe, optimizer: Any) -> None:
    """The last parameter, moved to a group of its own and replaced."""
    module.net[2].bias = replacement(module.net[2].bias)
    optimizer.param_groups[0]["params"].pop()
    optimizer.add_param_group({"params": [module.net[2].bias], "lr": 0.5})


class Replaces(BadBatchModule):
    """Replaces parameters after an update, and keeps norms and weights."""

    how: Callable[[Probe, Any], None] = staticmethod(in_place)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        grads = [p.grad for p in self.net.parameters() if p.grad is not None]
        if grads:
            self.norms.append(float(torch.stack([g.norm() for g in grads]).norm()))

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.global_step == REPLACED:
            self.how(self, self.trainer.optimizers[0])


def build(how: Callable[[Probe, Any], None], *, nan_at: int | None = None) -> Replaces:
    module = Replaces({} if nan_at is None else {nan_at: math.nan}, lr=0.01)
    module.how = how  # type: ignore[method-assign]
    return module


def fit(module: L.LightningModule, *callbacks: Any, **options: Any) -> L.Trainer:
    trainer = L.Trainer(**{**QUIET, "max_epochs": 1, "callbacks": list(callbacks), **options})
    trainer.fit(module, loader(32, 4))
    return trainer


def weights(module: Probe) -> list[float]:
    return [v for p in module.net.parameters() for v in p.detach().flatten().tolist()]


@pytest.mark.parametrize("how", [in_place, new_list, resized, moved])
def test_clipping_equals_that_of_lightning_after_a_replacement(how: Any) -> None:
    ours, lightnings = build(how), build(how)
    clipping = GradientClipping(NormClip(max_norm=0.1))
    fit(ours, clipping, StepGuard([NonFinite()]))
    fit(lightnings, gradient_clip_val=0.1)
    assert ours.norms == pytest.approx([0.1] * 8, rel=1e-4)
    assert weights(ours) == pytest.approx(weights(lightnings), rel=1e-5)
    (report,) = clipping.reports().values()
    assert report.fraction == 1.0


@pytest.mark.parametrize("how", [in_place, new_list, resized])
def test_guard_rejects_a_nan_in_a_new_tensor(how: Any) -> None:
    module, guard = build(how, nan_at=5), StepGuard([NonFinite()])
    fit(module, guard)
    assert [rejected.update for rejected in guard.rejections] == [5]
    assert "net.2.weight" in [name for name, _ in guard.rejections[0].parameters]
    assert all(map(math.isfinite, weights(module)))


def test_monitor_measures_the_new_tensors(tmp_path: Any) -> None:
    module = build(resized)
    logger = CSVLogger(tmp_path)
    monitor = OptimizationMonitor(every=1, layers="parameters")
    fit(module, monitor, logger=logger, log_every_n_steps=1)
    curves = read_run(logger.log_dir).curves
    totals = [value for _, value in curves["grad_norm/total"]]
    assert totals == pytest.approx(module.norms, rel=1e-5)
    zeros = [value for _, value in curves["layers/zeros/net.0.weight"]]
    assert zeros == [0.0] * 8  # dense gradients; the count of entries has grown


@pytest.mark.parametrize("grouped", [False, True])
def test_history_of_a_replaced_parameter_is_forgotten(grouped: bool) -> None:
    """Its first gradient is not clipped, as that of a new parameter: old gradients do not count."""

    def larger(module: Probe, optimizer: Any) -> None:
        module.net[2].weight = replacement(module.net[2].weight, 100.0)
        optimizer.param_groups[0]["params"] = list(module.net.parameters())

    rule: Any = AdaGC(warmup=1, max_norm=1e6)
    rule = Groups({"net.*": rule}) if grouped else rule
    seen: list[Any] = []

    class Sees(Replaces):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            (saved,) = clipping.saved_state()["rule"].values()
            state = saved["net.*"] if grouped else saved
            norm = float(self.net[2].weight.grad.norm())
            gamma = dict(zip(state["names"], state["gamma"].tolist(), strict=True))
            seen.append((norm, gamma["net.2.weight"]))

    module = Sees({}, lr=1e-4)
    module.how = larger  # type: ignore[method-assign]
    clipping = GradientClipping(rule)
    fit(module, clipping)
    norm, gamma = seen[REPLACED]
    assert norm > 5 * seen[REPLACED - 1][0]
    assert gamma == pytest.approx(norm, rel=1e-6)


def test_a_parameter_replaced_in_the_module_only_is_reported() -> None:
    def in_module(module: Probe, optimizer: Any) -> None:
        module.net[2].weight = replacement(module.net[2].weight)

    with pytest.warns(UserWarning, match=r"has replaced or removed: net\.2\.weight; put the new"):
        fit(build(in_module), LearningRateScheduler(Linear(start=1.0, end=0.0)))


def test_a_new_parameter_that_the_module_does_not_have_is_reported() -> None:
    def in_optimizer(module: Probe, optimizer: Any) -> None:
        optimizer.param_groups[0]["params"][2] = replacement(module.net[2].weight)

    with pytest.warns(UserWarning, match=r"that the module does not have: group0\.2"):
        fit(build(in_optimizer), GradientClipping(NormClip(max_norm=0.1)))


@pytest.mark.parametrize("how", [in_place, new_list, resized, moved])
@pytest.mark.filterwarnings("error:.*parameters.*")
def test_a_full_replacement_is_not_reported(how: Any) -> None:
    fit(build(how), GradientClipping(NormClip(max_norm=0.1)))
