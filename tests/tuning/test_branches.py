"""Branches train as a plain loop does, at any update of a fit, which they do not change."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_bigopt import (
    BatchSizeScheduler,
    ConstantBatchSize,
    GlobalBatchLoader,
    GradientClipping,
    GradientNoiseScale,
    LearningRateRangeTest,
    LearningRateScheduler,
    Linear,
    NoiseScaleBatchSize,
    NormClip,
)
from lightning_bigopt.optimizers import object_snapshot
from lightning_bigopt.trainer_access import separate_loop
from lightning_bigopt.tuning.branches import Branch, run_branch
from tests.helpers import QUIET, cpu_precision

pytestmark = pytest.mark.filterwarnings("ignore:.set_vital. is deprecated:UserWarning")

WEIGHTS = torch.randn(6, 1, generator=torch.Generator().manual_seed(0))


def dataset(samples: int = 240) -> TensorDataset:
    x = torch.randn(samples, 6, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x @ WEIGHTS)


def data(samples: int = 240, batch_size: int = 8, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset(samples), batch_size=batch_size, **options)


class Model(L.LightningModule):
    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1)
        )
        self.seen: list[Tensor] = []
        self.rates: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.seen.append(x[:, 0].clone())
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(float(optimizer.param_groups[0]["lr"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class BranchesAt(L.Callback):
    """Runs branches at the start of the fit, or after an update."""

    def __init__(self, update: int, **options: Any) -> None:
        self.update, self.options = update, options
        self.branches: list[Branch] = []
        self.before: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not self.update:
            self.run(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == self.update and not self.branches:
            self.run(trainer, pl_module)

    def run(self, trainer: L.Trainer, module: Any) -> None:
        module_, optimizer = copy.deepcopy((module.net, trainer.optimizers[0].state_dict()))
        self.before = module_, optimizer
        callbacks = self.options.pop("callbacks", lambda: ())
        for lr_factor in (1.0, 1.0, 3.0):
            branch = run_branch(
                trainer, module, callbacks=callbacks(), lr_factor=lr_factor, **self.options
            )
            self.branches.append(branch)


def fit(*callbacks: Any, loader: Any = None, model: Any = None, **options: Any) -> Model:
    module = model or Model()
    torch.manual_seed(3)
    trainer = L.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": list(callbacks), **options})
    trainer.fit(module, data() if loader is None else loader)
    module.optimizer = trainer.optimizers[0].state_dict()
    return module


@pytest.mark.parametrize("update", [0, 7, 30])
def test_branch_equals_a_plain_loop(update: int) -> None:
    """Five updates of 16 samples with three times the learning rate, then four batches."""
    at = BranchesAt(
        update,
        max_steps=5,
        evaluate=4,
        callbacks=lambda: [BatchSizeScheduler(ConstantBatchSize(16))],
    )
    fit(at)
    for factor, branch in zip((1.0, 1.0, 3.0), at.branches, strict=True):
        net, state = copy.deepcopy(at.before)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        optimizer.load_state_dict(state)
        optimizer.param_groups[0]["lr"] *= factor
        batches, losses = iter(data()), []
        for _ in range(5):
            optimizer.zero_grad()
            parts = []
            for _ in range(2):
                x, y = next(batches)
                loss = nn.functional.mse_loss(net(x), y)
                (loss / 2).backward()
                parts.append(float(loss.detach()))
            optimizer.step()
            losses.append(sum(parts) / 2)
        with torch.no_grad():
            evaluation = [
                float(nn.functional.mse_loss(net(x), y))
                for x, y, _ in ((*next(batches), 0) for _ in range(4))
            ]
        assert list(branch.losses) == pytest.approx(losses, rel=1e-5)
        assert list(branch.evaluation) == pytest.approx(evaluation, rel=1e-5)
        assert not branch.diverged
    assert at.branches[0] == at.branches[1] != at.branches[2]


LOADERS = {
    "shuffled": lambda: data(shuffle=True),
    "generator": lambda: data(shuffle=True, generator=torch.Generator().manual_seed(4)),
    "workers": lambda: data(shuffle=True, num_workers=1, persistent_workers=True),
    "exact": lambda: GlobalBatchLoader(dataset(), micro_batch_size=8),
    "stateful": lambda: StatefulDataLoader(
        dataset(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(4)
    ),
}


CASES = [(loader, "32-true") for loader in LOADERS]
CASES += [("shuffled", "bf16-mixed"), ("shuffled", "16-mixed")]


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, -1], ids=["before the engine", "after it"])
@pytest.mark.parametrize("update", [0, 7, 14, 15])
@pytest.mark.parametrize(("loader", "precision"), CASES)
def test_training_with_branches_equals_training_without_to_the_bit(
    update: int, loader: str, precision: str, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    """An epoch has 15 updates."""
    runs = []
    for branches in (False, True):
        at = BranchesAt(
            update,
            max_steps=9,
            evaluate=20,
            callbacks=lambda: [BatchSizeScheduler(ConstantBatchSize(32))],
        )
        callbacks: list[Any] = [
            LearningRateScheduler(Linear()),
            GradientClipping(NormClip(max_norm=0.1)),
            BatchSizeScheduler(ConstantBatchSize(16)),
        ]
        if branches:
            callbacks.insert(len(callbacks) if place else 0, at)
        module = fit(
            *callbacks,
            loader=LOADERS[loader](),
            model=Model(dropout=0.2),
            **cpu_precision(precision),
        )
        runs.append((module.state_dict(), module.optimizer, module.rates, module.seen))
        assert len(at.branches) == (3 if branches else 0)
        if branches:  # all branches have trained on the same data
            assert at.branches[0] == at.branches[1]
    plain, branched = runs
    assert len(plain[2]) == 30
    torch.testing.assert_close(branched[:2], plain[:2], rtol=0, atol=0)
    assert branched[2] == plain[2]
    # The branches have added to the list of batches, which is restored with the module.
    torch.testing.assert_close(branched[3], plain[3], rtol=0, atol=0)
    assert "Other code" not in caplog.text  # the steps of branches are not those of the run


def test_branch_that_diverges_ends_early() -> None:
    class Plain(Model):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    class Diverges(BranchesAt):
        def run(self, trainer: L.Trainer, module: Any) -> None:
            self.branches.append(
                run_branch(trainer, module, callbacks=(), max_steps=50, evaluate=4, lr_factor=1e30)
            )

    at, module = Diverges(3), Plain()
    fit(at, model=module)
    (branch,) = at.branches
    assert branch.diverged
    assert len(branch.losses) < 10
    assert not branch.evaluation
    assert all(bool(p.isfinite().all()) for p in module.parameters())


class OwnOrder(Sampler[int]):
    """Shuffles a list of its own in place, with a generator of its own."""

    def __init__(self, data_source: list[Tensor]) -> None:
        self.data_source = data_source
        self.order = list(range(len(data_source)))
        self.random = random.Random(3)

    def __iter__(self) -> Iterator[int]:
        self.random.shuffle(self.order)
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


def test_state_of_a_sampler_is_restored_without_a_copy_of_the_data() -> None:
    items = [torch.full((2,), float(index)) for index in range(8)]
    sampler = OwnOrder(items)
    loader = DataLoader(items, sampler=sampler)
    expected = [list(iter(copy.deepcopy(sampler)))]
    cloned: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        clone = object_snapshot.copy_to
        patch.setattr(
            object_snapshot,
            "copy_to",
            lambda tensor, *args, **kwargs: cloned.append(tensor) or clone(tensor, *args, **kwargs),
        )
        with separate_loop.loaders_restored(L.Trainer(logger=False), loader):
            assert len(list(loader)) == len(items)
    assert [list(sampler)] == expected
    assert cloned == []


def test_iterator_of_the_user_raises_before_a_batch_is_lost() -> None:
    batches = (batch for batch in data())
    test = LearningRateRangeTest(steps=20, on_result="report")
    with pytest.raises(ValueError, match=r"loader must be iterable again .* a list of batches"):
        fit(test, loader=batches, max_steps=5)
    assert len(list(batches)) == 30


def test_range_test_runs_with_a_batch_size_that_follows_the_noise_scale() -> None:
    test = LearningRateRangeTest(steps=20, on_result="report")
    fit(
        test,
        GradientNoiseScale(),
        BatchSizeScheduler(NoiseScaleBatchSize(16, high=64)),
    )
    assert test.result is not None
    assert len(test.result.losses) == 20
