"""A run that is resumed from an epoch's last batch, and resumed again, equals an uninterrupted one.

After a checkpoint of ``on_train_batch_end`` of an epoch's last batch, Lightning 2.6 trains the next
epoch without counting its beginning. A checkpoint within that epoch then looks like one between two
epochs, and a resume from it trains the epoch from its first batch again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_bigopt import (
    BatchSizeScheduler,
    ConstantBatchSize,
    GlobalBatchLoader,
    LearningRateScheduler,
    Linear,
)
from tests.helpers import QUIET, Regression, ResumableLoader

BATCHES = 5
EPOCHS = 4
MICRO = 2
# Lightning counts the batches of these on, from the epoch that the resume has left.
WITHOUT_LENGTH = ("GlobalBatchLoader", "without a length")


class Unsized(IterableDataset[Any]):
    """Has no length, and so its loader has none."""

    def __iter__(self) -> Any:
        data = Regression(BATCHES * MICRO)
        return iter([data[i] for i in range(len(data))])


def loader(kind: str) -> Any:
    data = Regression(BATCHES * MICRO)
    if kind == "saves its position":
        return ResumableLoader(len(data), MICRO)
    if kind == "GlobalBatchLoader":
        return GlobalBatchLoader(data, micro_batch_size=MICRO, seed=3)
    return DataLoader(Unsized() if kind == "without a length" else data, batch_size=MICRO)


class Recorded(L.LightningModule):
    """Records epoch, update, learning rate and samples of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))
        self.batches: list[Any] = []
        self.begun: list[int] = []
        self.ended: list[int] = []

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def on_train_epoch_start(self) -> None:
        self.begun.append(self.current_epoch)

    def on_train_epoch_end(self) -> None:
        self.ended.append(self.current_epoch)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        step, samples = self.trainer.global_step, batch[2].tolist()
        self.batches.append((self.current_epoch, batch_idx, step, rate, samples))
        return (batch[0] @ self.weight).mean()


class Validated(Recorded):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert not self.training

    def val_dataloader(self) -> Any:
        return DataLoader(Regression(2), batch_size=2)


class SavesAfter(L.Callback):
    """Saves a checkpoint in a hook after an update."""

    def __init__(self, path: Path, update: int, hook: str = "on_train_batch_end") -> None:
        self.path, self.update = path, update
        setattr(self, hook, self.save)

    def save(self, trainer: Any, *arguments: Any) -> None:
        if trainer.global_step == self.update:
            trainer.save_checkpoint(self.path)


def fit(
    kind: str, module: Recorded, *callbacks: Any, ckpt: Path | None = None, **limit: int
) -> Any:
    options = {**QUIET, "max_steps": -1, "num_sanity_val_steps": 0, **limit}
    budget = f"{EPOCHS * BATCHES} steps" if kind == "without a length" else None
    ours: list[Any] = [LearningRateScheduler(Linear(), budget=budget)]
    if kind == "GlobalBatchLoader":
        ours.append(BatchSizeScheduler(ConstantBatchSize(MICRO)))
    trainer = L.Trainer(**options, callbacks=[*ours, *callbacks])
    resumed: dict[str, Any] = {} if ckpt is None else {"ckpt_path": ckpt, "weights_only": True}
    trainer.fit(module, loader(kind), **resumed)
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.filterwarnings("ignore:Lightning continues an epoch that had")
@pytest.mark.parametrize("module", [Recorded, Validated])
@pytest.mark.parametrize(
    "limit", [{"max_epochs": EPOCHS}, {"max_steps": EPOCHS * BATCHES}], ids=str
)
@pytest.mark.parametrize(
    "kind", ["saves its position", "GlobalBatchLoader", "with a length", "without a length"]
)
@pytest.mark.parametrize("second", [6, 8, 10, 12])
def test_a_second_resume_continues_where_the_first_has_saved(
    tmp_path: Path, kind: str, limit: dict[str, int], module: Any, second: int
) -> None:
    first, then = tmp_path / "first.ckpt", tmp_path / "then.ckpt"
    straight = fit(kind, module(), SavesAfter(first, BATCHES), **limit)
    once = fit(kind, module(), SavesAfter(then, second), ckpt=first, **limit)
    twice = fit(kind, module(), ckpt=then, **limit)
    values = slice(2, None) if kind in WITHOUT_LENGTH else slice(None)
    assert [b[values] for b in once.batches] == [b[values] for b in straight.batches[BATCHES:]]
    assert once.begun == straight.begun[1:]
    if "length" in kind:
        # The data begins again; epochs, updates and learning rates do not.
        values = slice(2, 4)
    assert [b[values] for b in twice.batches] == [b[values] for b in straight.batches[second:]]
    assert twice.ended[-2:] == straight.ended[-2:]


class LastRates(L.Callback):
    """Records the learning rate at the end of each epoch, and at the end of the fit."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.found.append(trainer.optimizers[0].param_groups[0]["lr"])

    on_train_end = on_train_epoch_end


@pytest.mark.filterwarnings("ignore:Lightning continues an epoch that had")
@pytest.mark.parametrize("kind", ["saves its position", "GlobalBatchLoader", "with a length"])
@pytest.mark.parametrize("update", [10, 20])
@pytest.mark.parametrize("hook", ["on_validation_end", "on_train_batch_end", "on_train_epoch_end"])
def test_a_resume_after_the_last_batch_of_an_epoch_has_the_learning_rate_of_its_end(
    tmp_path: Path, hook: str, update: int, kind: str
) -> None:
    path, straight, resumed = tmp_path / "saved.ckpt", LastRates(), LastRates()
    limit = {"max_epochs": EPOCHS}
    fit(kind, Validated(), SavesAfter(path, update, hook), straight, **limit)
    fit(kind, Validated(), resumed, ckpt=path, **limit)
    assert len(straight.found) == EPOCHS + 1
    assert resumed.found == straight.found[EPOCHS + 1 - len(resumed.found) :]


@pytest.mark.parametrize("second", [6, 10])
@pytest.mark.parametrize("kind", ["saves its position", "GlobalBatchLoader"])
@pytest.mark.parametrize(
    "limit", [{"max_epochs": EPOCHS}, {"max_steps": EPOCHS * BATCHES}], ids=str
)
@pytest.mark.parametrize("hook", ["on_validation_end", "on_train_epoch_end"])
def test_a_second_resume_after_another_hook(
    tmp_path: Path, hook: str, limit: dict[str, int], kind: str, second: int
) -> None:
    first, then = tmp_path / "first.ckpt", tmp_path / "then.ckpt"
    straight = fit(kind, Validated(), SavesAfter(first, BATCHES, hook), **limit)
    once = fit(kind, Validated(), SavesAfter(then, second), ckpt=first, **limit)
    twice = fit(kind, Validated(), ckpt=then, **limit)
    assert [b[2:] for b in once.batches] == [b[2:] for b in straight.batches[BATCHES:]]
    assert [b[2:] for b in twice.batches] == [b[2:] for b in straight.batches[second:]]
