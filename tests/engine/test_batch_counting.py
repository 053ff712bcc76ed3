"""Counting of batches without a loss, without an update, skipped, or ended by an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_bigopt import (
    GradientClipping,
    LearningRateScheduler,
    Linear,
    NormClip,
    OptimizationMonitor,
    StepGuard,
)
from lightning_bigopt.reporting.runs import read_run
from tests.helpers import QUIET, cpu_precision


class LossForSomeBatches(L.LightningModule):
    """Returns no loss for one batch of every epoch."""

    def __init__(self, *, without: int | None) -> None:
        super().__init__()
        self.layer, self.without = torch.nn.Linear(3, 1), without

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == self.without else self.layer(batch[0]).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("without", [None, 1, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_without_a_loss_are_counted(
    tmp_path: Path, accumulate: int, without: int | None, precision: str
) -> None:
    """Two epochs with batches of 4, 4 and 2 samples, in windows of ``accumulate``."""
    down = Linear(start=1.0, end=0.0)
    trainer = L.Trainer(
        **{**QUIET, "logger": CSVLogger(tmp_path), "max_epochs": 2, "max_steps": -1},
        log_every_n_steps=1,
        accumulate_grad_batches=accumulate,
        **cpu_precision(precision),
        callbacks=[
            LearningRateScheduler(down),
            GradientClipping(NormClip(max_norm=5.0, schedule=down)),
            OptimizationMonitor(layers=None),
        ],
    )
    data = TensorDataset(torch.randn(10, 3))
    trainer.fit(LossForSomeBatches(without=without), DataLoader(data, batch_size=4))
    expected = []
    windows = [(0,), (1,), (2,)] if accumulate == 1 else [(0, 1), (2,)]
    for epoch in range(2):
        for number, window in enumerate(windows):
            # There is no update without a gradient, nor under a GradScaler if the last batch of the
            # window has no loss.
            if window == (without,) or (precision == "16-mixed" and window[-1] == without):
                continue
            size = sum((4, 4, 2)[batch] for batch in window)
            before, left = 10 * epoch + 4 * window[0], 1 - (3 * epoch + window[0]) / 6
            step = len(windows) * epoch + number
            expected.append((step, size, before + size, left, 5 * left))
    curves = read_run(str(trainer.log_dir)).curves
    tags = ("batch/global_size", "progress/samples", "optim/lr", "clip/threshold")
    found = zip(*(curves[tag] for tag in tags), strict=True)
    assert [(points[0][0], *(value for _, value in points)) for points in found] == [
        pytest.approx(row) for row in expected
    ]


class StepsEverySecondBatch(LossForSomeBatches):
    """Steps the optimizer at every second batch only, in its own ``optimizer_step``."""

    def __init__(self) -> None:
        super().__init__(without=None)
        self.rates: list[float] = []

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])
        if batch_idx % 2:
            optimizer_closure()
        else:
            optimizer.step(closure=optimizer_closure)


def test_learning_rate_advances_with_batches_that_have_no_update() -> None:
    module = StepsEverySecondBatch()
    trainer = L.Trainer(
        **{**QUIET, "max_epochs": 2, "max_steps": -1},
        callbacks=[LearningRateScheduler(Linear(start=1.0, end=0.0))],
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(16, 3)), batch_size=4))
    assert module.rates == [1 - batch / 8 for batch in range(8)]


class EndsFirstEpochEarly(LossForSomeBatches):
    """Ends the first epoch at the start of one of its batches."""

    def __init__(self, *, at: int) -> None:
        super().__init__(without=None)
        self.at = at
        self.rates: list[float] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if (self.current_epoch, batch_idx) == (0, self.at) else None

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("at", [0, 1, 3])
def test_epoch_that_on_train_batch_start_ends_early_counts_as_an_epoch(at: int) -> None:
    module = EndsFirstEpochEarly(at=at)
    trainer = L.Trainer(
        **{**QUIET, "max_epochs": 3, "max_steps": -1},
        callbacks=[LearningRateScheduler(Linear(start=1.0, end=0.0))],
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(16, 3)), batch_size=4))
    consumed = [*range(at), *range(4, 12)]
    assert module.rates == [1 - batch / 12 for batch in consumed]


def test_second_fit_after_an_error_begins_the_epoch_again() -> None:
    class Fails(EndsFirstEpochEarly):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            super().on_before_optimizer_step(optimizer)
            if len(self.rates) == 3:
                raise ZeroDivisionError

    module = Fails(at=-1)
    trainer = L.Trainer(
        **{**QUIET, "max_epochs": 2, "max_steps": -1},
        callbacks=[LearningRateScheduler(Linear(start=1.0, end=0.0))],
    )
    data = DataLoader(TensorDataset(torch.randn(16, 3)), batch_size=4)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, data)
    trainer.fit(module, data)
    assert module.rates[:5] == [1 - batch / 8 for batch in (0, 1, 2, 0, 1)]


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
@pytest.mark.parametrize("added", [[], [StepGuard()]], ids=["alone", "with_guard"])
def test_batch_that_is_none_is_consumed_without_samples(tmp_path: Path, added: list[Any]) -> None:
    class Gaps(DataLoader[Any]):
        def __iter__(self) -> Any:
            for index, batch in enumerate(super().__iter__()):
                yield None if index == 1 else batch

    module = EndsFirstEpochEarly(at=-1)
    trainer = L.Trainer(
        **{**QUIET, "logger": CSVLogger(tmp_path), "max_epochs": 2, "max_steps": -1},
        log_every_n_steps=1,
        callbacks=[
            LearningRateScheduler(Linear(start=1.0, end=0.0)),
            *added,
            OptimizationMonitor(layers=None),
        ],
    )
    trainer.fit(module, Gaps(TensorDataset(torch.randn(16, 3)), batch_size=4))
    assert module.rates == [1 - batch / 8 for batch in (0, 2, 3, 4, 6, 7)]
    samples = read_run(str(trainer.log_dir)).curves["progress/samples"]
    assert [value for _, value in samples] == [4, 8, 12, 16, 20, 24]
