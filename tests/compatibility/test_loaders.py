"""Loaders of torchdata and Hugging Face: samples and learning rates of a resumed run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_bigopt import (
    BatchSizeScheduler,
    ConstantBatchSize,
    GlobalBatchLoader,
    LearningRateScheduler,
    Linear,
)
from tests.helpers import QUIET

# torchdata 0.11 calls a function of torch 2.13 that is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")

SAMPLES, WINDOW, EPOCHS = 24, 3, 3
BATCHES = SAMPLES // 2  # in an epoch


class Model(L.LightningModule):
    """Records the samples of every batch and the learning rate of every update."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 1)
        self.batches: list[list[int]] = []
        self.lrs: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.batches.append(batch["index"].tolist())
        loss: Tensor = self.net(batch["x"]).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.lrs.append(optimizer.param_groups[0]["lr"])


class SavesAfter(L.Callback):
    """Saves a checkpoint after a number of batches."""

    def __init__(self, batches: int, path: Path) -> None:
        self.batches, self.path = batches, path
        self.updates = 0

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.batches:
            self.updates = trainer.global_step
            trainer.save_checkpoint(self.path)


def table() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    columns = {"x": torch.randn(SAMPLES, 4, generator=generator).tolist()}
    return Dataset.from_dict({**columns, "index": list(range(SAMPLES))}).with_format("torch")


def stream() -> IterableDataset:
    return table().to_iterable_dataset(num_shards=4)


class SizedLoader(StatefulDataLoader):
    """Has a number of batches in an epoch, so that Lightning fetches no batch ahead."""

    def __len__(self) -> int:
        return BATCHES


def train(data: Any, *callbacks: Any, **options: Any) -> Model:
    resume = {name: options.pop(name) for name in ("ckpt_path", "weights_only") if name in options}
    budget = options.pop("budget", None)
    model = Model()
    own = [LearningRateScheduler(Linear(start=1.0, end=0.0), budget=budget), *callbacks]
    options = {"max_epochs": EPOCHS, "accumulate_grad_batches": WINDOW, **options}
    L.Trainer(**{**QUIET, **options}, callbacks=own).fit(model, data, **resume)
    return model


def resumed(
    make: Callable[[], Any], batches: int, path: Path, **options: Any
) -> tuple[Model, Model, int]:
    """Returns an uninterrupted and a resumed run, and the updates before the checkpoint."""
    torch.manual_seed(1)
    saves = SavesAfter(batches, path / "saved.ckpt")
    straight = train(make(), saves, **options)
    torch.manual_seed(2)
    options |= {"ckpt_path": saves.path, "weights_only": False}
    return straight, train(make(), **options), saves.updates


@pytest.mark.parametrize(
    ("workers", "batches"),
    [
        *((0, batches) for batches in (6, BATCHES, 18, 2 * BATCHES)),
        *(pytest.param(2, batches, marks=pytest.mark.slow) for batches in (18, 2 * BATCHES)),
    ],
)
def test_stateful_loader_is_exact_between_windows_and_epochs(
    tmp_path: Path, workers: int, batches: int
) -> None:
    def make() -> Any:
        options: dict[str, Any] = {"num_workers": workers, "snapshot_every_n_steps": 1 + workers}
        return StatefulDataLoader(table(), batch_size=2, shuffle=True, **options)

    straight, second, updates = resumed(make, batches, tmp_path)
    assert len(straight.batches) == EPOCHS * BATCHES
    assert second.batches == straight.batches[batches:]
    assert second.lrs == straight.lrs[updates:]


def test_stateful_loader_loses_a_window(tmp_path: Path) -> None:
    def make() -> Any:
        return StatefulDataLoader(table(), batch_size=2, shuffle=True)

    straight, second, updates = resumed(make, 20, tmp_path)
    assert second.batches == straight.batches[20:]  # batches 18 and 19 have no update
    assert second.lrs[1:] == straight.lrs[updates + 1 :]


@pytest.mark.parametrize("batches", [18, 20, 2 * BATCHES])
def test_global_batch_loader_takes_a_hugging_face_dataset(tmp_path: Path, batches: int) -> None:
    def make() -> Any:
        return GlobalBatchLoader(table(), micro_batch_size=2, seed=1)

    def run(*callbacks: Any, **resume: Any) -> Model:
        size = BatchSizeScheduler(ConstantBatchSize(2 * WINDOW))
        return train(make(), size, *callbacks, accumulate_grad_batches=1, **resume)

    saves = SavesAfter(batches, tmp_path / "saved.ckpt")
    straight = run(saves)
    second = run(ckpt_path=saves.path, weights_only=True)
    assert second.batches == straight.batches[saves.updates * WINDOW :]
    assert second.lrs == straight.lrs[saves.updates :]


def test_stream_without_length_needs_a_budget() -> None:
    with pytest.raises(ValueError, match="budget"):
        train(DataLoader(stream(), batch_size=2))
    model = train(DataLoader(stream(), batch_size=2), budget="12 steps")
    assert len(model.batches) == EPOCHS * BATCHES
    assert model.lrs == pytest.approx([0.1 * (1 - update / 12) for update in range(12)])


def test_lightning_fetches_one_batch_ahead_without_a_length(tmp_path: Path) -> None:
    def make() -> Any:
        return StatefulDataLoader(stream(), batch_size=2)

    straight, second, updates = resumed(make, 6, tmp_path, budget="4 steps", max_epochs=1)
    assert second.batches == straight.batches[7:]  # batch 6 is lost
    assert second.lrs == straight.lrs[updates : updates + len(second.lrs)]


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
def test_stream_with_a_length_is_exact_in_its_first_epoch(tmp_path: Path) -> None:
    def make() -> Any:
        return SizedLoader(stream(), batch_size=2)

    straight, second, updates = resumed(make, 6, tmp_path, max_epochs=1)
    assert second.batches == straight.batches[6:]
    assert second.lrs == straight.lrs[updates:]


def test_global_batch_loader_refuses_a_stream() -> None:
    with pytest.raises(ValueError, match="dataset must have a length and an index"):
        GlobalBatchLoader(stream(), micro_batch_size=2)  # type: ignore[arg-type]
