"""The tail of an epoch of a GlobalBatchLoader in fits: updates, learning rates and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    ConstantBatchSize,
    FullBatch,
    GlobalBatchLoader,
    LearningRateScheduler,
    Linear,
    OptimizationMonitor,
    WarmupConstant,
    plan,
)
from lightning_bigopt.batching import simulate_exact
from lightning_bigopt.engine.horizon_state import horizon_from_state, horizon_to_state
from tests.batch_helpers import ExactEpochs, SaveEvery, train_tail_recorder
from tests.helpers import QUIET, Probe, Regression, fit

TAILS = ("keep", "merge", "drop")
SIZES = {"keep": [4, 4, 3], "merge": [4, 7], "drop": [4, 4]}  # of an epoch of 11 samples
STARTS = {"keep": [0, 4, 8], "merge": [0, 4], "drop": [0, 4]}


class OneLoader(ExactEpochs):
    """Trains on epochs of 11 samples, and records learning rate and samples of every update."""

    def __init__(self, tail: Any, *, samples: int = 11, micro: int = 2) -> None:
        super().__init__(samples, micro=micro)
        self.tail = tail

    def train_dataloader(self) -> Any:
        return GlobalBatchLoader(
            Regression(self.epochs[0]), micro_batch_size=self.micro, tail=self.tail
        )

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step([batch[0][:, :3]], batch_idx)


def trained(module: OneLoader, *callbacks: Any, policy: Any = None, **options: Any) -> OneLoader:
    scheduler = BatchSizeScheduler(policy or ConstantBatchSize(4))
    fit(module, None, scheduler, *callbacks, **options)
    return module


@pytest.mark.parametrize("tail", TAILS)
def test_epochs_end_on_the_budget(tail: str) -> None:
    module = trained(OneLoader(tail), LearningRateScheduler(Linear()), max_epochs=3)
    assert module.sizes == SIZES[tail] * 3
    expected = [1 - (epoch + at / 11) / 3 for epoch in range(3) for at in STARTS[tail]]
    assert module.rates == pytest.approx(expected, abs=1e-12)


def test_left_out_samples_spend_a_budget_in_samples() -> None:
    scheduler = LearningRateScheduler(Linear(), budget="30 samples")
    module = trained(OneLoader("drop"), scheduler, max_epochs=-1)
    starts = [0, 4, 11, 15, 22, 26]
    assert module.sizes == [4] * len(starts)
    assert module.rates == pytest.approx([1 - at / 30 for at in starts], abs=1e-12)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("length", ["5 steps", "1 epochs", "22 samples", "40%"])
def test_durations_are_converted_through_the_updates_that_are_trained(
    tail: str, length: str
) -> None:
    schedule = WarmupConstant(warmup=length)
    module = trained(OneLoader(tail), LearningRateScheduler(schedule), max_epochs=4)
    starts = [11 * epoch + at for epoch in range(4) for at in STARTS[tail]]
    end = {"5 steps": starts[5], "1 epochs": 11, "22 samples": 22, "40%": 0.4 * 44}[length]
    assert module.rates == pytest.approx([min(at / end, 1) for at in starts], abs=1e-12)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(
    "limits",
    [
        {"max_epochs": 3},
        {"max_steps": 7},
        {"max_epochs": 3, "max_steps": 7},
        {"max_epochs": -1, "budget": "30 samples"},
    ],
    ids=["epochs", "steps", "both", "samples"],
)
def test_plan_equals_the_run(tail: str, limits: dict[str, Any]) -> None:
    limits = dict(limits)
    budget = limits.pop("budget", None)
    policy = BatchSizeSteps({"0%": 3, "30%": 5, "60%": 2, "80%": 6})

    def trainer() -> L.Trainer:
        scheduler = LearningRateScheduler(Linear(start=1.0, end=0.1), budget=budget)
        callbacks = [scheduler, BatchSizeScheduler(policy)]
        return L.Trainer(**{**QUIET, "callbacks": callbacks, "max_steps": -1, **limits})

    rows = plan(trainer(), OneLoader(tail)).rows
    module = OneLoader(tail)
    trainer().fit(module)
    assert [row.global_batch_size for row in rows] == module.sizes
    assert [rate for row in rows for rate in row.learning_rates.values()] == pytest.approx(
        module.rates, abs=1e-12
    )


@pytest.mark.parametrize("tail", TAILS)
def test_gradient_is_the_mean_over_the_samples_of_the_update(tail: Any) -> None:
    module = Probe(lr=0.01)
    loader = GlobalBatchLoader(Regression(11), micro_batch_size=2, tail=tail)
    fit(module, loader, BatchSizeScheduler(ConstantBatchSize(4)), max_epochs=2)
    assert [len(window) for window in module.windows] == SIZES[tail] * 2
    assert max(module.errors) <= 1e-6
    epochs = [module.windows[: len(SIZES[tail])], module.windows[len(SIZES[tail]) :]]
    for windows in epochs:
        seen = sorted(index for window in windows for index in window)
        assert len(set(seen)) == len(seen) == sum(SIZES[tail])


@pytest.mark.parametrize("tail", TAILS)
def test_weights_are_those_of_a_plain_loop(tail: Any) -> None:
    data = Regression(11)
    loader = GlobalBatchLoader(data, micro_batch_size=2, shuffle="sequential", tail=tail)
    module = Probe(lr=0.05)
    start = {name: value.clone() for name, value in module.net.state_dict().items()}
    fit(module, loader, BatchSizeScheduler(ConstantBatchSize(4)), max_epochs=2)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    net.load_state_dict(start)
    net.double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for first, size in list(zip(STARTS[tail], SIZES[tail], strict=True)) * 2:
        x, y = (
            torch.stack([data[i][part] for i in range(first, first + size)]).double()
            for part in (0, 1)
        )
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
    for mine, plain in zip(module.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(mine.double(), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("tail", ["merge", "drop"])
def test_resume_at_every_micro_batch_gives_the_same_bits(tmp_path: Path, tail: str) -> None:
    straight = train_tail_recorder(tail, SaveEvery(tmp_path))
    count = len(list(tmp_path.glob("*.ckpt")))
    assert count > len(straight.seen)  # inside windows too
    for number in range(1, count):
        resumed = train_tail_recorder(tail, ckpt=tmp_path / f"{number}.ckpt")
        assert resumed.seen == straight.seen[len(straight.seen) - len(resumed.seen) :], number
        assert resumed.rates == straight.rates[len(straight.seen) - len(resumed.seen) :], number
        for mine, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
            assert torch.equal(mine, theirs), number


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new"), [("keep", "merge"), ("keep", "drop"), ("merge", "drop")])
def test_resume_with_another_tail_trains_the_rest_of_the_epoch(
    tmp_path: Path, old: str, new: str
) -> None:
    """Also from the update before a tail, which the other policy would not have."""
    straight = train_tail_recorder(old, SaveEvery(tmp_path))
    for number in range(1, len(list(tmp_path.glob("*.ckpt")))):
        path = tmp_path / f"{number}.ckpt"
        state = torch.load(path, weights_only=True)
        done = state["global_step"]
        resumed = train_tail_recorder(new, ckpt=path)
        assert resumed.seen or done == len(straight.seen), number
        assert resumed.trainer.current_epoch == 3, number
        if done < len(straight.seen):
            assert resumed.rates[0] == straight.rates[done], number


def test_left_out_samples_count_as_consumed_but_not_as_trained(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    trained(OneLoader("drop"), OptimizationMonitor(every=1), max_epochs=2, logger=logger)
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert len(lines) > 1
    names, *rows = [line.split(",") for line in lines]

    def values(name: str) -> list[float]:
        return [float(row[names.index(name)]) for row in rows if row[names.index(name)]]

    assert values("progress/samples") == [4, 11, 15, 22]
    assert values("batch/global_size") == [4, 4, 4, 4]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("samples", [1, 3, 5, 11])
def test_full_batch_and_fast_dev_run(tail: str, samples: int) -> None:
    full = trained(OneLoader(tail, samples=samples), policy=FullBatch(), max_epochs=2)
    assert full.sizes == [samples] * 2
    for batches in (1, 3):
        module = trained(OneLoader(tail, samples=samples), fast_dev_run=batches)
        # Every batch is an update.
        assert max(module.sizes) <= 2
        assert len(module.sizes) == min(batches, -(-samples // 2))


def test_learning_rate_follows_the_planned_size_for_every_tail() -> None:
    """As for ``keep``, whose tail does not scale the learning rate."""
    policy = BatchSizeSteps({"0%": 4, "1 epochs": 8})
    for tail, sizes in {
        "keep": [4, 4, 3, 8, 3],
        "merge": [4, 7, 11],
        "drop": [4, 4, 8],
    }.items():
        module = OneLoader(tail)
        scheduler = BatchSizeScheduler(policy, lr_scaling="linear")
        fit(module, None, scheduler, max_epochs=2)
        assert module.sizes == sizes
        first = len(SIZES[tail])
        assert module.rates == [1.0] * first + [2.0] * (len(sizes) - first)


class SaveInHook(L.Callback):
    """Saves a checkpoint in a hook of every epoch."""

    def __init__(self, folder: Path, hook: str) -> None:
        def save(trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(folder / f"{trainer.current_epoch}.ckpt")

        setattr(self, hook, save)


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_epoch_end"])
@pytest.mark.parametrize("tail", TAILS)
def test_resume_from_the_start_and_the_end_of_an_epoch(
    tmp_path: Path, tail: str, hook: str
) -> None:
    straight = train_tail_recorder(tail, SaveInHook(tmp_path, hook))
    for epoch in (0, 1):
        resumed = train_tail_recorder(tail, ckpt=tmp_path / f"{epoch}.ckpt")
        done = len(straight.seen) - len(resumed.seen)
        assert done == straight.starts[epoch + (hook == "on_train_epoch_end")]
        assert resumed.seen == straight.seen[done:]
        assert resumed.rates == straight.rates[done:]


def test_rewound_epoch_with_a_tail_is_trained_again() -> None:
    class Rewinds(L.Callback):
        snapshot: Any = None

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            fit_of_engine = scheduler.fit
            if trainer.global_step == 1 and self.snapshot is None:
                self.snapshot = fit_of_engine.take_snapshot()
            elif trainer.global_step == 2 and not module.rewound:
                module.rewound = True
                self.snapshot.restore()

    class Module(OneLoader):
        rewound = False

    scheduler = BatchSizeScheduler(ConstantBatchSize(4))
    module = Module("drop")
    fit(module, None, LearningRateScheduler(Linear()), scheduler, Rewinds(), max_epochs=2)
    assert module.sizes == [4] * 5
    shares = [0, 4, 4, 11, 15]
    assert module.rates == pytest.approx([1 - share / 22 for share in shares], abs=1e-12)


def test_a_saved_horizon_has_the_samples_left_out() -> None:
    horizon = simulate_exact(
        ConstantBatchSize(4),
        clock="samples",
        budget=22,
        micro_batch_size=2,
        world_size=1,
        samples_per_epoch=11,
        tail="drop",
    )
    state = horizon_to_state(horizon)
    loaded = horizon_from_state(state)
    assert loaded is not None
    assert [span.left_out for span in loaded.spans] == [0, 3, 0, 3]
    assert loaded.spans == horizon.spans


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_saved_config_sets_the_tail() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(GlobalBatchLoader, "loader", skip={"dataset"})
    saved = parser.dump(parser.parse_string("loader: {micro_batch_size: 2, tail: merge}"))
    options = parser.parse_string(saved).loader.as_dict()
    loader = GlobalBatchLoader(Regression(11), **options)
    module = Probe(lr=0.01)
    fit(module, loader, BatchSizeScheduler(ConstantBatchSize(4)), max_epochs=1)
    assert [len(window) for window in module.windows] == [4, 7]
    with pytest.raises(ArgumentError, match="last"):
        parser.parse_string("loader: {micro_batch_size: 2, tail: last}")
