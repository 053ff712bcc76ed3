"""BatchSizeScheduler with users' loaders: exact gradients, or an error at the start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler

from lightning_bigopt import BatchSizeScheduler, BatchSizeSteps, ConstantBatchSize
from tests.batch_helpers import UnsizedStream
from tests.helpers import Probe, Regression, fit, loader

POLICY = BatchSizeSteps({"0%": 4, "2 steps": 6})


def check_gradients_and_samples(module: Probe, epochs: int = 1, size: int = 14) -> None:
    assert max(module.errors) <= 1e-6
    assert sum(map(len, module.windows)) == epochs * size


class EvenSampler(Sampler[int]):
    """A user's sampler with a length."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(0, 28, 2))

    def __len__(self) -> int:
        return 14


class SamplerWithoutLength(EvenSampler):
    """A sampler whose length is unknown."""

    def __len__(self) -> int:
        raise TypeError("unknown")


class UnevenBatchSampler(Sampler[list[int]]):
    """Batches of different sizes, as from bucketing by length."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0, 1], [2], [3, 4, 5], [6, 7], [8, 9, 10, 11], [12], [13]])

    def __len__(self) -> int:
        return 7


class DataModule(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader(14, 2)


def sized_batches() -> DataLoader[Any]:
    data = Regression(14)
    return DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 2, drop_last=False))


@pytest.mark.parametrize(
    "data",
    [
        loader(14, 2),
        loader(14, 2, shuffle=True),
        loader(14, 2, sampler=RandomSampler(Regression(14))),
        DataLoader(Regression(28), batch_size=2, sampler=EvenSampler()),
        DataLoader(UnsizedStream(14), batch_size=2),
        sized_batches(),
        CombinedLoader(loader(14, 2)),
        DataModule(),
    ],
    ids=["map", "shuffled", "random", "sampler", "unsized", "batches", "combined", "datamodule"],
)
def test_gradients_are_exact_with_every_loader(data: Any) -> None:
    module = Probe(lr=0.01)
    fit(module, data, BatchSizeScheduler(POLICY, budget="14 samples"), max_epochs=1)
    check_gradients_and_samples(module)
    assert [len(w) for w in module.windows[:3]] == [4, 4, 6]


def test_sampler_without_length() -> None:
    module = Probe(lr=0.01)
    data = DataLoader(Regression(28), batch_size=2, sampler=SamplerWithoutLength())
    fit(module, data, BatchSizeScheduler(ConstantBatchSize(4)), max_epochs=1)
    check_gradients_and_samples(module)


def test_batches_of_different_sizes_give_the_mean_over_samples() -> None:
    module = Probe(lr=0.01)
    data = DataLoader(Regression(14), batch_sampler=UnevenBatchSampler())
    fit(module, data, BatchSizeScheduler(ConstantBatchSize(6), micro_batch_size=2), max_epochs=2)
    check_gradients_and_samples(module, epochs=2)
    assert [len(w) for w in module.windows[:3]] == [6, 7, 1]


class PlainIterable:
    """Four batches from an iterable that is no DataLoader."""

    def __iter__(self) -> Iterator[Any]:
        return iter([[torch.zeros(2, 4), torch.zeros(2, 3), torch.arange(2)]] * 4)


class UsesFirstLoader(Probe):
    """Trains on the first of two loaders."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch["a"], batch_idx)


def test_several_loaders_need_micro_batch_size_and_samples() -> None:
    data = {"a": loader(14, 2), "b": loader(7, 1)}
    module = UsesFirstLoader(lr=0.01)
    scheduler = BatchSizeScheduler(
        ConstantBatchSize(4), micro_batch_size=2, samples=lambda batch: len(batch["a"][0])
    )
    fit(module, CombinedLoader(data, "min_size"), scheduler, max_epochs=1)
    check_gradients_and_samples(module)
    scheduler = BatchSizeScheduler(ConstantBatchSize(4))
    with pytest.raises(ValueError, match=r"must have a batch_size.*micro_batch_size="):
        fit(UsesFirstLoader(), CombinedLoader(data, "min_size"), scheduler, max_epochs=1)


def test_iterable_that_is_no_dataloader_needs_micro_batch_size() -> None:
    batches = PlainIterable()
    with pytest.raises(ValueError, match=r"got \['PlainIterable'\].*micro_batch_size="):
        fit(Probe(), batches, BatchSizeScheduler(ConstantBatchSize(4)), max_epochs=1)
    module = Probe()
    scheduler = BatchSizeScheduler(ConstantBatchSize(4), micro_batch_size=2)
    fit(module, batches, scheduler, max_epochs=1)
    assert [len(w) for w in module.windows] == [4, 4]


def test_micro_batch_size_must_be_that_of_the_loader() -> None:
    scheduler = BatchSizeScheduler(ConstantBatchSize(6), micro_batch_size=3)
    with pytest.raises(ValueError, match="must be the loader's own batch_size, 2, or None, got 3"):
        fit(Probe(), loader(14, 2), scheduler, max_epochs=1)


class NewLoaderEveryEpoch(Probe):
    """Returns a new loader every epoch."""

    def __init__(self, *sizes: tuple[int, int]) -> None:
        super().__init__(lr=0.01)
        self.sizes = sizes

    def train_dataloader(self) -> Any:
        return loader(*self.sizes[self.current_epoch])


def test_recreated_loader_may_change_its_length_but_not_its_batch_size() -> None:
    def run(module: NewLoaderEveryEpoch) -> None:
        scheduler = BatchSizeScheduler(ConstantBatchSize(8))
        fit(module, None, scheduler, max_epochs=3, reload_dataloaders_every_n_epochs=1)

    module = NewLoaderEveryEpoch((14, 2), (13, 2), (19, 2))
    run(module)
    assert [len(w) for w in module.windows] == [8, 6, 8, 5, 8, 8, 3]
    assert max(module.errors) <= 1e-6
    with pytest.raises(ValueError, match=r"must keep its batch_size.*got 4 after 2"):
        run(NewLoaderEveryEpoch((16, 2), (16, 4), (16, 4)))


@pytest.mark.parametrize(
    ("size", "micro", "options", "expected"),
    [
        (7, 2, {}, [7, 7]),  # fewer samples than the global batch
        (3, 8, {}, [3, 3]),  # fewer than a micro-batch
        (35, 2, {"drop_last": True}, [16, 16, 2, 16, 16, 2]),
        (20, 2, {"num_workers": 2, "persistent_workers": True}, [16, 4, 16, 4]),
    ],
    ids=["small", "tiny", "drop_last", "workers"],
)
@pytest.mark.filterwarnings("ignore:The global batch .* is larger than an epoch")
def test_no_sample_is_lost_or_counted_twice(
    size: int, micro: int, options: dict[str, Any], expected: list[int]
) -> None:
    module = Probe(lr=0.01)
    data = loader(size, micro, **options)
    fit(module, data, BatchSizeScheduler(ConstantBatchSize(16)), max_epochs=2)
    assert [len(w) for w in module.windows] == expected
    assert max(module.errors) <= 1e-6


@pytest.mark.parametrize(("limit", "sized"), [(5, True), (0.7, True), (5, False)])
def test_limit_train_batches_ends_an_epoch(limit: float, sized: bool) -> None:
    module = Probe(lr=0.01)
    data = loader(15, 2) if sized else DataLoader(UnsizedStream(15), batch_size=2)
    fit(
        module,
        data,
        BatchSizeScheduler(ConstantBatchSize(4)),
        max_epochs=2,
        limit_train_batches=limit,
    )
    assert [len(w) for w in module.windows] == [4, 4, 2] * 2  # five of eight batches
    assert max(module.errors) <= 1e-6
