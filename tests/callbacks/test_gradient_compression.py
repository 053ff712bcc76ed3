"""GradientCompression on one process: TopK acts on the gradient, the others do nothing."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from lightning_bigopt import (
    BF16,
    FP16,
    BatchSizeScheduler,
    BatchSizeSteps,
    ConstantBatchSize,
    GlobalBatchLoader,
    GradientClipping,
    GradientCompression,
    GradientCompressionMixin,
    GradientNoiseScale,
    NonFinite,
    NormClip,
    PowerSGD,
    StepGuard,
    TopK,
)
from tests.helpers import Probe, Regression, SaveAt, cpu_precision, fit, loader
from tests.mean_gradients import MICRO, Means, first_element, mean_data, sum_of_means


class Plain(Probe):
    """Probe without the comparison of gradients; one batch may be a NaN."""

    bad: int | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, index = batch
        loss = self.loss(x, y / (index + 1).unsqueeze(1))
        return loss * math.nan if batch_idx == self.bad else loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norms.append(
            float(
                nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
            )
        )


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def top_k_loop(keep: float, updates: int, *, start: int = 0) -> torch.Tensor:
    """Trains with the algorithm of Stich et al. on one worker, in a plain loop."""
    model, data = Plain().net, Regression(4 * updates)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    memory = [torch.zeros_like(p) for p in model.parameters()]
    for update in range(updates):
        rows = torch.arange(4 * update, 4 * update + 4)
        y = data.y[rows] / (rows + 1).unsqueeze(1)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(data.x[rows]), y).backward()
        for index, parameter in enumerate(model.parameters()):
            if update < start:
                continue
            whole = (parameter.grad + memory[index]).flatten()
            count = math.ceil(keep * whole.numel())
            order = whole.abs().argsort(descending=True)
            sent = torch.zeros_like(whole)
            sent[order[:count]] = whole[order[:count]]
            memory[index] = (whole - sent).view_as(parameter)
            parameter.grad = sent.view_as(parameter)
        optimizer.step()
    return flat(model)


@pytest.mark.parametrize(("start", "first"), [(0, 0), ("25%", 2), ("3 steps", 3), (5, 5)])
def test_top_k_equals_a_plain_loop(start: Any, first: int) -> None:
    model, callback = Plain(), GradientCompression(TopK(keep=0.2, start=start))
    fit(model, loader(32, 4), callback, max_steps=8)
    expected = top_k_loop(0.2, 8, start=first)
    assert torch.allclose(flat(model), expected, atol=1e-6)
    assert not torch.allclose(expected, top_k_loop(1.0, 8), atol=1e-3)


@pytest.mark.parametrize("compressor", [FP16(), BF16(), PowerSGD(rank=1)])
def test_others_do_nothing_on_one_process_and_say_so(
    compressor: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, bare = Plain(), Plain()
    with caplog.at_level(logging.INFO):
        fit(model, loader(16, 4), GradientCompression(compressor), max_epochs=1)
    (line,) = [r.message for r in caplog.records if "has no effect" in r.message]
    assert "one process sends no gradients. Only TopK acts on the gradient" in line
    fit(bare, loader(16, 4), max_epochs=1)
    assert torch.equal(flat(model), flat(bare))


def test_ddp_with_one_process_equals_no_strategy(tmp_path: Path) -> None:
    runs = []
    for options in ({}, {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 1}):
        options["use_distributed_sampler"] = False  # which would shuffle
        model = Plain()
        fit(model, loader(16, 4), GradientCompression(TopK(keep=0.2)), max_epochs=2, **options)
        runs.append(flat(model))
    torch.distributed.destroy_process_group()
    assert torch.equal(*runs)


def test_clipping_and_norms_follow_the_compression() -> None:
    model = Plain()
    callbacks = [GradientClipping(NormClip(max_norm=0.1)), GradientCompression(TopK(keep=0.1))]
    fit(model, loader(32, 4), *callbacks, max_epochs=1)
    assert max(model.norms) <= 0.1 + 1e-6  # seen after both
    zeros = [float((p.grad == 0).float().mean()) for p in model.net.parameters()]
    assert min(zeros) >= 0.6


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, precision: str) -> None:
    runs = []
    for path in (None, tmp_path / "saved.ckpt"):
        model, callback = Plain(), GradientCompression(TopK(keep=0.2))
        saves = [] if path else [SaveAt(tmp_path / "saved.ckpt", 4)]  # also within the next window
        policy = BatchSizeScheduler(BatchSizeSteps({"0%": 4, "3 steps": 8}))
        data = GlobalBatchLoader(Regression(32), micro_batch_size=4)
        options = cpu_precision(precision)
        fit(model, data, callback, policy, *saves, ckpt_path=path, max_steps=10, **options)
        runs.append((flat(model), callback.residuals))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1].keys() == runs[1][1].keys()
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])
    assert any(value.any() for value in runs[0][1].values())


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_rejected_batch_leaves_no_trace(precision: str) -> None:
    runs = []
    for bad in (3, None):
        model, callback = Plain(), GradientCompression(TopK(keep=0.2))
        model.bad = bad
        rows = [i for i in range(32) if bad is not None or i // 4 != 3]
        data = torch.utils.data.DataLoader(Regression(32), batch_size=4, sampler=rows)
        fit(
            model,
            data,
            callback,
            StepGuard([NonFinite()]),
            max_epochs=1,
            **cpu_precision(precision),
        )
        runs.append((flat(model), callback.residuals))
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(runs[0][1][name], value) for name, value in runs[1][1].items())


def test_a_second_fit_and_another_trainer() -> None:
    model, callback = Plain(), GradientCompression(TopK(keep=0.2))
    trainer = fit(model, loader(16, 4), callback, max_epochs=1)
    first = copy.deepcopy(callback.residuals)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, loader(16, 4))
    straight, other = Plain(), GradientCompression(TopK(keep=0.2))
    fit(straight, loader(16, 4), other, max_epochs=2)
    assert torch.equal(flat(model), flat(straight))
    assert all(torch.equal(other.residuals[name], v) for name, v in callback.residuals.items())
    assert any(not torch.equal(first[name], v) for name, v in callback.residuals.items())
    again = Plain()
    fit(again, loader(16, 4), callback, max_epochs=1)  # another run starts without residuals
    assert all(torch.equal(first[name], value) for name, value in callback.residuals.items())


def test_a_changed_compressor_is_reported_and_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "saved.ckpt"
    first = GradientCompression(TopK(keep=0.2))
    fit(Plain(), loader(32, 4), first, SaveAt(path, 4), max_steps=4)
    callback, seen = GradientCompression(TopK(keep=0.5)), {}

    class Looks(L.Callback):
        def on_train_start(self, *args: Any) -> None:
            seen.update(callback.residuals)

    with caplog.at_level(logging.INFO):
        fit(Plain(), loader(32, 4), callback, Looks(), max_steps=6, ckpt_path=path)
    assert any(
        "TopK(keep=0.2, start=0) → TopK(keep=0.5, start=0)" in r.message for r in caplog.records
    )
    assert all(torch.equal(seen[name], value) for name, value in first.residuals.items())


def test_the_noise_scale_is_measured_before_the_start_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scale, compression = GradientNoiseScale(), GradientCompression(TopK(keep=0.2, start="50%"))
    options = {"max_steps": 8, "accumulate_grad_batches": 2}
    with caplog.at_level(logging.INFO):
        fit(Plain(), loader(64, 4), scale, compression, **options)
    assert scale.estimator.updates == 4
    assert any("not measured while TopK or PowerSGD" in r.message for r in caplog.records)


class Mixed(GradientCompressionMixin, Plain):
    def configure_gradient_compression(self) -> TopK:
        return TopK(keep=0.2)


def test_the_mixin_adds_the_callback() -> None:
    mixed, plain = Mixed(), Plain()
    fit(mixed, loader(16, 4), max_epochs=1)
    fit(plain, loader(16, 4), GradientCompression(TopK(keep=0.2)), max_epochs=1)
    assert torch.equal(flat(mixed), flat(plain))


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: GradientCompression(0.1), ValueError, "compressor must be a Compressor, got 0.1"),
        (lambda: GradientCompression(TopK), ValueError, r"write TopK\(...\)"),
        (GradientCompression, TypeError, r"GradientCompression\(PowerSGD\(rank=1\)\)"),
        (
            lambda: fit(Plain(), loader(16, 4), TopK(), max_steps=1),
            AttributeError,
            r"write GradientCompression\(TopK\(",
        ),
    ],
)
def test_errors(build: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        build()


def test_a_start_needs_a_limit() -> None:
    with pytest.raises(ValueError, match="max_steps"):
        fit(
            Plain(),
            loader(16, 4),
            GradientCompression(TopK(start="10%")),
            max_epochs=-1,
        )


@pytest.mark.parametrize("weight", [None, first_element])
def test_a_rescaled_window_adds_what_was_left(weight: Any) -> None:
    """Updates and residual are the sum of the means of all windows; the last has 1 sample of 8."""
    data = mean_data(33, seed=0)
    model, callback = Means(), GradientCompression(TopK(keep=0.02))
    policy = BatchSizeScheduler(ConstantBatchSize(2 * MICRO), weight=weight)
    fit(model, DataLoader(data, batch_size=MICRO), callback, policy, max_epochs=2)  # type: ignore[arg-type]
    found = callback.residuals["weight"] - model.weight.detach()
    truth = 2 * sum_of_means([data], window=2, weight=weight)
    assert torch.allclose(found, truth, atol=1e-5)


def test_a_policy_can_be_removed_in_mid_run() -> None:
    policy = BatchSizeScheduler(ConstantBatchSize(2 * MICRO))

    class Removes(L.Callback):
        def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
            if policy in trainer.callbacks:
                trainer.callbacks.remove(policy)

    model, callback = Means(), GradientCompression(TopK(keep=0.02))
    data = mean_data(8, seed=0)
    fit(model, DataLoader(data, batch_size=MICRO), callback, policy, Removes(), max_epochs=2)  # type: ignore[arg-type]
    found = callback.residuals["weight"] - model.weight.detach()
    truth = data.mean(0) + sum_of_means([data], window=1, weight=None)
    assert torch.allclose(found, truth, atol=1e-5)
    assert policy.fit is None


def test_residuals_have_plain_names() -> None:
    """A compiled module resumes from the checkpoint of one that is not compiled."""
    model, callback = Plain(), GradientCompression(TopK(keep=0.2))
    model.net = torch.compile(model.net, backend="eager")  # type: ignore[assignment]
    fit(model, loader(16, 4), callback, max_epochs=1)
    assert {name.split(".")[0] for name in callback.residuals} == {"net"}
    assert not any("_orig_mod" in name for name in callback.residuals)
