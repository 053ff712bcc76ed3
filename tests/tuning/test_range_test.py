"""The range test in fits: the sweep, the use of its result, and the state restored after it."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning_utilities.core import rank_zero
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    GradientClipping,
    LearningRateRangeTest,
    LearningRateScheduler,
    Linear,
    NormClip,
    learning_rate_range_test,
)
from lightning_bigopt.examples.gpt import BytesGPT
from lightning_bigopt.examples.text import SourceText
from tests.helpers import QUIET, ManualUpdates, cpu_precision

WEIGHTS = torch.randn(6, 1, generator=torch.Generator().manual_seed(3))


def data(samples: int = 240, batch_size: int = 8, **options: Any) -> DataLoader[Any]:
    x = torch.randn(samples, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x @ WEIGHTS), batch_size=batch_size, **options)


class Model(L.LightningModule):
    """A regression with every kind of state that a sweep must restore."""

    def __init__(self, lr: float = 0.01, *, dropout: float = 0.0, noise: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(5)
        self.lr, self.noise = lr, noise
        self.net = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1)
        )
        self.metric = MeanMetric()
        self.seen: list[float] = []
        self.rates: list[tuple[float, ...]] = []
        self.outside: list[list[float]] = []  # not restored: a list inside a list

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x = x + self.noise * (random.random() + float(np.random.rand()))  # noqa: NPY002
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", self.metric(loss))
        self.seen.append(float(loss.detach()))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(tuple(float(g["lr"]) for g in optimizer.param_groups))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class CountsBatches(L.Callback):
    """A user's callback with state, which a sweep must not change."""

    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.batches += 1


def fit(module: L.LightningModule, *callbacks: Any, loader: Any = None, **options: Any) -> Any:
    trainer = L.Trainer(**{**QUIET, "max_epochs": 1, "callbacks": list(callbacks), **options})
    trainer.fit(module, data() if loader is None else loader)
    return trainer


# ----------------------------------------------------------------------------------- the sweep


def test_sweep_equals_training_with_exponentially_rising_learning_rates() -> None:
    """Compares with a plain loop."""
    module, test = Model(), LearningRateRangeTest(start=1e-5, end=1.0, steps=40, on_result="report")
    copied = copy.deepcopy(module)
    fit(module, test)
    optimizer, losses, found = copied.configure_optimizers(), [], test.result
    assert found is not None
    batches = [batch for _ in range(2) for batch in data()]
    for t, (x, y) in enumerate(batches[: len(found.losses)]):
        optimizer.param_groups[0]["lr"] = 1e-5 * (1.0 / 1e-5) ** (t / 39)
        loss = nn.functional.mse_loss(copied.net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert len(losses) > 25
    assert list(found.losses) == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_sweep_with_mixed_precision_and_accumulation(precision: str, accumulate: int) -> None:
    test = LearningRateRangeTest(on_result="report", steps=60, start=1e-5)
    fit(
        Model(),
        test,
        accumulate_grad_batches=accumulate,
        **cpu_precision(precision),
    )
    assert test.result is not None
    assert test.result.suggestion is not None
    assert 1e-4 < test.result.suggestion < 1.0


def test_report_says_what_each_number_is(caplog: pytest.LogCaptureFixture) -> None:
    test = LearningRateRangeTest(on_result="report", steps=60, start=1e-5)
    with caplog.at_level("INFO", logger=rank_zero.log.name):
        fit(Model(), test)
    (text,) = (r.getMessage() for r in caplog.records if "range test:" in r.getMessage())
    assert test.result is not None
    assert test.result.bracket is not None
    low, high = test.result.bracket
    assert text == (
        f"Learning-rate range test: {test.result.suggestion:.3g}, where the loss falls fastest. "
        "Two other rules (the middle of the longest descent, and a tenth of the learning rate at "
        f"the minimum) suggest {low:.3g} and {high:.3g}."
    )


def test_accumulated_point_is_the_mean_loss_of_its_window() -> None:
    one, four = (
        LearningRateRangeTest(on_result="report", steps=20, start=1e-9, end=1e-8) for _ in "ab"
    )
    fit(Model(), one, loader=data(batch_size=32, drop_last=True))
    fit(Model(), four, loader=data(batch_size=8), accumulate_grad_batches=4)
    # The losses differ by BatchNorm only, which normalizes other batches.
    assert one.result is not None and four.result is not None  # noqa: PT018
    assert four.result.losses[:7] == pytest.approx(one.result.losses[:7], rel=0.2)


def test_sweep_stops_when_the_loss_diverges() -> None:
    class PlainSGD(Model):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    test = LearningRateRangeTest(on_result="report", end=1e6)
    fit(PlainSGD(), test)
    assert test.result is not None
    assert test.result.diverged
    assert len(test.result.losses) < 100
    assert test.result.suggestion is not None
    assert test.result.suggestion < 10.0


def test_sweep_clips_and_uses_the_first_batch_size() -> None:
    found = []
    for max_norm in (1e-6, 1e6):
        module, test = Model(), LearningRateRangeTest(on_result="report", steps=30)
        policy = BatchSizeScheduler(BatchSizeSteps({"0%": 16, "20%": 48}))
        trainer = fit(module, test, GradientClipping(NormClip(max_norm=max_norm)), policy)
        found.append(test.result)
        assert trainer.global_step < 15  # the training itself ramps
    # 15 windows of 16 an epoch, so that 30 updates are exactly two epochs.
    assert all(result is not None and len(result.losses) == 30 for result in found)

    class Plain(Model):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    last_losses = []
    for max_norm in (1e-6, 1e6):
        test = LearningRateRangeTest(on_result="report", steps=30, end=0.1)
        fit(Plain(), test, GradientClipping(NormClip(max_norm=max_norm)))
        assert test.result is not None
        last_losses.append(test.result.smoothed[-1])
    assert last_losses[0] > last_losses[1]


# ---------------------------------------------------------------------------- use of the result


def test_learning_rate_scheduler_uses_the_suggestion_in_any_order() -> None:
    for first in (True, False):
        module, test = Model(), LearningRateRangeTest()
        scheduler = LearningRateScheduler(Linear())
        fit(module, *([test, scheduler] if first else [scheduler, test]))
        assert test.result is not None
        found = test.result.suggestion
        assert found is not None
        assert found != 0.01
        assert module.rates == [(found * (1 - t / 30),) for t in range(30)]
        assert module.lr == module.hparams.lr == found


def test_optimizer_groups_use_the_suggestion_and_keep_their_ratios() -> None:
    class Grouped(Model):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(
                [
                    {"params": self.net[0].parameters(), "lr": 0.01},
                    {"params": self.net[4].parameters(), "lr": torch.tensor(0.04)},
                ]
            )

    module, test = Grouped(), LearningRateRangeTest()
    fit(module, test)
    assert test.result is not None
    found = test.result.suggestion
    assert found is not None
    assert module.rates == [(found, pytest.approx(4 * found, rel=1e-6))] * 30


def test_scheduler_of_the_module_uses_the_suggestion() -> None:
    class Scheduled(Model):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
            decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
            schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], [5])
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    untested, module, test = Scheduled(), Scheduled(), LearningRateRangeTest()
    fit(untested)
    fit(module, test)
    assert test.result is not None
    factor = test.result.suggestion / 0.01
    assert module.rates == [(pytest.approx(rate * factor, rel=1e-9),) for (rate,) in untested.rates]


def test_resumed_run_is_not_tested_again(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    straight, test = Model(), LearningRateRangeTest()
    scheduler = LearningRateScheduler(Linear())
    fit(straight, test, scheduler, checkpoint, enable_checkpointing=True)
    resumed, again = Model(), LearningRateRangeTest()
    trainer = L.Trainer(**QUIET, max_epochs=1, callbacks=[again, LearningRateScheduler(Linear())])
    trainer.fit(resumed, data(), ckpt_path=tmp_path / "step=10.ckpt", weights_only=True)
    assert again.result == test.result
    assert resumed.rates[0] == straight.rates[10]


# -------------------------------------------------------------------------------- restored state


@pytest.mark.slow
@pytest.mark.parametrize("how", ["callback", "function"])
@pytest.mark.parametrize("workers", [0, 1])
def test_training_after_the_test_equals_training_without_it_to_the_bit(
    how: str, workers: int, tmp_path: Path
) -> None:
    def build() -> tuple[Model, DataLoader[Any], CountsBatches, CSVLogger]:
        module = Model(dropout=0.3, noise=0.1)
        random.seed(1)
        np.random.seed(2)  # noqa: NPY002
        torch.manual_seed(3)
        generator = torch.Generator().manual_seed(4)
        options: dict[str, Any] = {"num_workers": workers, "persistent_workers": bool(workers)}
        loader = data(shuffle=True, generator=generator, **options)
        return module, loader, CountsBatches(), CSVLogger(tmp_path, name=f"{len(runs)}")

    runs: list[Any] = []
    for tested in (False, True):
        module, loader, counter, logger = build()
        callbacks: list[Any] = [counter, LearningRateScheduler(Linear())]
        if tested and how == "callback":
            callbacks.insert(1, LearningRateRangeTest(on_result="report", steps=40))
        options: dict[str, Any] = {"max_epochs": 2, "logger": logger, "log_every_n_steps": 1}
        trainer = L.Trainer(**{**QUIET, "callbacks": callbacks, **options})
        if tested and how == "function":
            found = learning_rate_range_test(trainer, module, loader, steps=40)
            assert found.suggestion is not None
            assert trainer.global_step == trainer.current_epoch == 0
            assert trainer.callbacks[0] is counter
            assert module.lr == 0.01
            assert not Path(logger.log_dir).exists()
        trainer.fit(module, loader)
        state = {k: v.clone() for k, v in module.state_dict().items()}
        optimizer = copy.deepcopy(trainer.optimizers[0].state_dict())
        randoms = (random.random(), float(np.random.rand()), float(torch.rand(1)))  # noqa: NPY002
        logged = (Path(logger.log_dir) / "metrics.csv").read_text()
        runs.append((state, optimizer, randoms, logged, module.seen, module.rates, counter.batches))
    plain, tested_run = runs
    torch.testing.assert_close(tested_run[:2], plain[:2], rtol=0, atol=0)
    assert tested_run[2:] == plain[2:]


def test_sweep_that_raises_restores_everything() -> None:
    class Failing(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 5 and self.fails:
                raise ArithmeticError("on purpose")
            return super().training_step(batch, batch_idx)

    module = Failing()
    module.fails = True
    before = copy.deepcopy(module.state_dict())
    trainer = L.Trainer(**QUIET, max_epochs=1)
    with pytest.raises(ArithmeticError):
        learning_rate_range_test(trainer, module, data())
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    module.fails = False
    trainer.fit(module, data())
    assert trainer.global_step == 30


def test_function_sets_the_lr_of_the_module_with_on_result_use() -> None:
    module = Model()
    trainer = L.Trainer(**QUIET, max_epochs=1)
    found = learning_rate_range_test(trainer, module, data(), on_result="use")
    assert module.lr == found.suggestion
    trainer.fit(module, data())
    assert module.rates[0] == (found.suggestion,)


def test_training_step_without_a_loss_raises() -> None:
    class Manual(ManualUpdates, Model):
        """Makes the updates itself."""

    with pytest.raises(ValueError, match=r"training_step must return the loss"):
        fit(Manual(), LearningRateRangeTest())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0.0}, r"start must be in \[1e-100, 1e\+100\), got 0\.0"),
        ({"start": 1.0, "end": 0.1}, r"end must be in \(1, 1e\+100\], got 0.1; .* above start=1.0"),
        ({"steps": 10**30}, "steps must be a number of updates of at most 2"),
        ({"steps": 10**7}, r"steps must be in \(10, 1e\+06\], got 10000000; 100 are enough"),
        ({"steps": 12}, "steps must be a number of updates of at least 13"),
        ({"skip": -1}, "skip must be a non-negative number of points, got -1"),
        ({"smoothing": 1.0}, r"smoothing must be in \[0, 1\)"),
        ({"stop_at": 1.0}, r"stop_at must be in \(1, inf\], got 1.0; inf never stops"),
        ({"on_result": "train"}, "on_result must be 'use' or 'report', got 'train'"),
    ],
)
def test_invalid_arguments_raise_with_their_names(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearningRateRangeTest(**options)


# ------------------------------------------------------------------------------------- the demo


@pytest.mark.slow
def test_suggestion_for_the_demo_is_closer_than_that_of_the_finder_of_lightning(
    tmp_path: Path,
) -> None:
    """A grid search found 6e-3 (WSD) and 1.2e-2 (linear to zero) for this model."""
    torch.manual_seed(0)
    text = SourceText()
    quiet: dict[str, Any] = {**QUIET, "logger": CSVLogger(tmp_path)}
    trainer = L.Trainer(**quiet, max_steps=1000, default_root_dir=tmp_path)
    module = BytesGPT(width=48, layers=2)
    ours = learning_rate_range_test(trainer, module, datamodule=text).suggestion
    finder = LearningRateFinder()
    torch.manual_seed(0)
    module = BytesGPT(width=48, layers=2)
    trainer = L.Trainer(
        **quiet, max_steps=1, limit_val_batches=0, callbacks=[finder], default_root_dir=tmp_path
    )
    trainer.fit(module, datamodule=text)
    theirs = finder.optimal_lr.suggestion()
    assert ours is not None
    assert 6e-4 <= ours <= 1.2e-1
    assert 6e-3 / theirs > 10 > 6e-3 / ours
