"""GlobalBatchFinder with a simulated memory limit: the found size, and everything restored."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_bigopt import (
    BatchSizeScheduler,
    ConstantBatchSize,
    GlobalBatchFinder,
    GlobalBatchLoader,
)
from tests.helpers import QUIET, Probe, Regression, loader


class LimitedMemory(Probe):
    """Raises OutOfMemoryError above a number of samples."""

    tried: ClassVar[list[int]] = []  # on the class: attributes of the module are restored

    def __init__(self, limit: int = 11, **options: Any) -> None:
        super().__init__(optimizer=torch.optim.AdamW, **options)
        self.limit, self.micro_batch_size = limit, 1
        self.metric = MeanMetric()
        self.dropout = torch.nn.Dropout(0.5)
        self.norm = torch.nn.BatchNorm1d(4)
        self.frozen: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.frozen is None:
            self.tried.append(len(batch[0]))
        if len(batch[0]) > self.limit:
            raise torch.OutOfMemoryError("on purpose")
        loss = self.loss(self.norm(self.dropout(batch[0])), batch[1])
        self.metric.update(loss)
        self.log("loss", self.metric)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Disabled: the expected gradient of Probe has no dropout."""

    def train_dataloader(self) -> Any:
        torch.rand(1)
        return DataLoader(Regression(96), batch_size=self.micro_batch_size, shuffle=True)


class RecordsEverything(L.Callback):
    """Records everything that a search may change."""

    def __init__(self) -> None:
        self.before: list[Any] = []

    def record(self, trainer: L.Trainer, module: Any) -> list[Any]:
        return [
            {name: value.clone() for name, value in module.state_dict().items()},
            [dict(optimizer.state) for optimizer in trainer.optimizers],
            torch.get_rng_state(),
            module.metric.mean_value.clone(),
            [parameter.grad for parameter in module.parameters()],
            [part.training for part in module.modules()],
            sorted(module.__dict__),
        ]


class RecordsBefore(RecordsEverything):
    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.before = self.record(trainer, pl_module)


class RecordsAfter(RecordsEverything):
    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.before = self.record(trainer, pl_module)
        pl_module.frozen = True


def search(
    module: LimitedMemory, data: Any = None, **options: Any
) -> tuple[GlobalBatchFinder, L.Trainer]:
    finder = GlobalBatchFinder(**{"global_batch_size": 48, "smallest": 2, **options})
    callbacks = [finder, BatchSizeScheduler(ConstantBatchSize(finder.global_batch_size))]
    trainer = L.Trainer(**QUIET, max_steps=1, callbacks=callbacks)
    trainer.fit(module, data)
    return finder, trainer


@pytest.mark.slow
def test_found_size_ran_divides_the_batch_and_keeps_headroom() -> None:
    module = LimitedMemory(limit=13)
    finder, trainer = search(module)
    assert finder.found is not None
    assert finder.found.largest == 12
    assert finder.found.micro_batch_size == module.micro_batch_size == 8
    assert (8, True) in finder.found.trials
    assert trainer.train_dataloader.batch_size == 8


@pytest.mark.slow
def test_found_size_is_set_on_a_global_batch_loader() -> None:
    data = GlobalBatchLoader(Regression(96), micro_batch_size=1)
    finder, _ = search(LimitedMemory(limit=200), data, headroom=0.0, search="power")
    assert data.micro_batch_size == 16
    assert finder.found is not None
    assert finder.found.largest == 16


@pytest.mark.slow
def test_search_restores_everything() -> None:
    before, after, module = RecordsBefore(), RecordsAfter(), LimitedMemory()
    LimitedMemory.tried.clear()
    callbacks = [before, GlobalBatchFinder(global_batch_size=48, smallest=2), after]
    L.Trainer(**QUIET, max_steps=1, callbacks=callbacks).fit(module)
    assert len(module.tried) > 5
    first, second = before.before, after.before
    for name, value in first[0].items():
        assert torch.equal(value, second[0][name]), name
    assert first[1] == second[1] == [{}]
    assert torch.equal(first[2], second[2])
    assert torch.equal(first[3], second[3])
    assert first[4] == second[4]
    assert first[5:] == second[5:]


@pytest.mark.slow
def test_unsupported_uses_raise() -> None:
    with pytest.raises(ValueError, match="fit into memory"):
        search(LimitedMemory(limit=1))
    with pytest.raises(ValueError, match="minimum must leave a size"):
        search(LimitedMemory(), smallest=49)
    with pytest.raises(ValueError, match="attribute must be the name"):
        search(LimitedMemory(), attribute="nothing")
    with pytest.raises(ValueError, match="attribute must be the name"):
        search(LimitedMemory(), loader(8, 2))
    with pytest.raises(ValueError, match="with a length and an index"):
        search(LimitedMemory(), [1, 2, 3])
    for bad in (
        {"global_batch_size": 0},
        {"global_batch_size": 8, "headroom": 1.0},
        {"global_batch_size": 8, "search": "linear"},
    ):
        with pytest.raises(ValueError, match="got"):
            GlobalBatchFinder(**bad)


def test_other_errors_are_raised() -> None:
    class Failing(LimitedMemory):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ArithmeticError("on purpose")

    with pytest.raises(ArithmeticError, match="on purpose"):
        search(Failing())


def test_sync_batch_norm_with_several_processes_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # DDP supports SyncBatchNorm on GPUs only, so no fit of two processes on a CPU gets here.
    module, finder = LimitedMemory(), GlobalBatchFinder(global_batch_size=24)
    module.norm = torch.nn.SyncBatchNorm(4)
    trainer = L.Trainer(**QUIET)
    finder._check_supported(trainer, module)
    monkeypatch.setattr(L.Trainer, "world_size", 2)
    with pytest.raises(ValueError, match=r"contain no SyncBatchNorm .* got one and 2 processes"):
        finder._check_supported(trainer, module)
