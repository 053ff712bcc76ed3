"""Schedules over the time of training. A fake clock advances by one second in every batch.

The right learning rates follow from the number of batches; Lightning's own Timer, with the same
clock, ends the runs under ``max_time``.
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, Timer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    LearningRateScheduler,
    Linear,
    WarmupStableDecay,
    plan,
)
from tests.helpers import QUIET, SaveAt
from tests.older_lightning import fault_of_2_5_0

TEN_SECONDS = "00:00:00:10"


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0)
    fake = SimpleNamespace(monotonic=lambda: clock.now)
    monkeypatch.setattr("lightning_bigopt.engine.training_time.time", fake)
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", fake)
    return clock


class Recorded(L.LightningModule):
    """Records the learning rate of every update; every batch takes one second."""

    def __init__(self, clock: Any, *, seconds: float = 1.0) -> None:
        super().__init__()
        self.layer, self.seconds = nn.Linear(3, 1), seconds
        self.rates: list[float] = []
        object.__setattr__(self, "clock", clock)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.clock.now += self.seconds
        return self.layer(batch[0]).square().mean() * 1e-6

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        optimizer.register_step_post_hook(lambda o, *_: self.rates.append(o.param_groups[0]["lr"]))
        return optimizer

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(400, 3)), batch_size=2)


def fit(module: Recorded, *callbacks: Any, ckpt: Path | None = None, **options: Any) -> L.Trainer:
    trainer = L.Trainer(**{**QUIET, **options}, callbacks=list(callbacks))
    trainer.fit(module, ckpt_path=ckpt)
    return trainer


def down(seconds: float = 10, *, start: int = 0, stop: int = 10) -> Any:
    return pytest.approx([1 - second / seconds for second in range(start, stop)])


def test_max_time_alone_drives_the_schedule(clock: Any) -> None:
    module = Recorded(clock)
    fit(module, LearningRateScheduler(Linear()), max_time=TEN_SECONDS)
    assert module.rates == down()


def test_a_slow_machine_makes_fewer_updates_over_the_whole_schedule(clock: Any) -> None:
    module = Recorded(clock, seconds=2.5)
    fit(module, LearningRateScheduler(Linear()), max_time={"seconds": 10})
    assert module.rates == pytest.approx([1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("budget", ["10 seconds", "10 s", "0.16666666666666666 min"])
def test_budget_in_time_drives_the_schedule_and_ends_the_run(clock: Any, budget: str) -> None:
    module = Recorded(clock)
    scheduler = LearningRateScheduler(Linear(), budget=budget)
    fit(module, scheduler, max_epochs=1000)
    assert module.rates == down()


def test_second_fit_after_a_budget_in_time_does_not_train(clock: Any) -> None:
    module = Recorded(clock)
    trainer = fit(module, LearningRateScheduler(Linear(), budget="10 s"), max_epochs=1000)
    clock.now += 500
    trainer.fit(module)
    assert module.rates == down()


def test_durations_are_times(clock: Any) -> None:
    module = Recorded(clock)
    schedule = WarmupStableDecay(warmup="2 s", decay="5 s", cooldown="linear")
    fit(module, LearningRateScheduler(schedule), max_time=TEN_SECONDS)
    assert module.rates == pytest.approx([0, 0.5, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("length", ["5 steps", "1 epoch", "4 samples"])
def test_durations_in_other_units_are_refused(clock: Any, length: str) -> None:
    with pytest.raises(ValueError, match=r"warmup must be in seconds or percent here.*machine"):
        fit(
            Recorded(clock),
            LearningRateScheduler(WarmupStableDecay(warmup=length)),
            max_time=TEN_SECONDS,
        )


def test_times_are_refused_where_the_budget_is_no_time(clock: Any) -> None:
    with pytest.raises(ValueError, match=r"warmup must be in steps or percent here, got .*machine"):
        fit(
            Recorded(clock),
            LearningRateScheduler(WarmupStableDecay(warmup="10 min")),
            max_steps=10,
        )
    policy = BatchSizeSteps({"0%": 2, "10 min": 4})
    with pytest.raises(ValueError, match=r"thresholds of a batch-size policy .* got a time"):
        fit(Recorded(clock), BatchSizeScheduler(policy), max_steps=10)
    with pytest.raises(ValueError, match=r"^rewarmup must be in steps, .*got '10 min'"):
        BatchSizeScheduler(policy, lr_scaling="sqrt", rewarmup="10 min")


def test_safety_limit_does_not_drive_the_schedule(
    clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    module = Recorded(clock)
    with (
        caplog.at_level(logging.INFO),
        pytest.warns(UserWarning, match=r"^max_time ended the run at 50% of .* 20 steps"),
    ):
        fit(module, LearningRateScheduler(Linear()), max_time=TEN_SECONDS, max_steps=20)
    assert module.rates == down(20)
    (line,) = [text for text in caplog.messages if "max_time may end the run" in text]
    assert "budget of 20 steps" in line
    assert "budget='10 seconds'" in line


def test_safety_limit_that_is_not_reached_logs_nothing_at_the_end(clock: Any) -> None:
    module = Recorded(clock)  # a warning would be an error here
    fit(module, LearningRateScheduler(Linear()), max_time=TEN_SECONDS, max_steps=5)
    assert module.rates == down(5, stop=5)


def test_timer_without_a_duration_is_no_limit(clock: Any) -> None:
    module = Recorded(clock)
    fit(module, Timer(), LearningRateScheduler(Linear()), max_steps=10)
    assert module.rates == down()


class Stops(Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == 4


@fault_of_2_5_0("after should_stop a second fit trains nothing")
def test_second_fit_has_the_whole_time_again_as_for_the_timer(clock: Any) -> None:
    module = Recorded(clock)
    trainer = fit(module, LearningRateScheduler(Linear()), Stops(), max_time=TEN_SECONDS)
    clock.now += 500
    module.rates.clear()
    trainer.fit(module)
    assert module.rates == down()


class Waits(Callback):
    """Waits, as a validation does, after some updates."""

    def __init__(self, clock: Any) -> None:
        self.clock = clock

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            self.clock.now += 4


def test_time_between_updates_counts(clock: Any) -> None:
    module = Recorded(clock)
    fit(module, Waits(clock), LearningRateScheduler(Linear()), max_time=TEN_SECONDS)
    assert module.rates == pytest.approx([1.0, 0.9, 0.8, 0.3, 0.2, 0.1])


@pytest.mark.parametrize("budget", [None, "10 s"])
@pytest.mark.parametrize("stop", [1, 4, 9])
def test_time_before_a_resume_counts_and_the_pause_does_not(
    clock: Any, tmp_path: Path, stop: int, budget: str | None
) -> None:
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options: dict[str, Any] = {"max_time": TEN_SECONDS} if budget is None else {"max_epochs": 1000}

    def scheduler() -> LearningRateScheduler:
        return LearningRateScheduler(Linear(), budget=budget)

    fit(Recorded(clock), scheduler(), saves, enable_checkpointing=True, **options)
    clock.now += 500
    resumed = Recorded(clock)
    fit(resumed, scheduler(), ckpt=tmp_path / f"step={stop}.ckpt", **options)
    assert resumed.rates == down(start=stop)


def test_checkpoint_of_a_bare_trainer_brings_the_time_of_its_timer(
    clock: Any, tmp_path: Path
) -> None:
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(Recorded(clock), saves, enable_checkpointing=True, max_time=TEN_SECONDS)
    resumed = Recorded(clock)
    with pytest.warns(UserWarning, match=r"the schedule continues at 40.0% of this Trainer"):
        fit(
            resumed,
            LearningRateScheduler(Linear()),
            ckpt=tmp_path / "step=4.ckpt",
            max_time=TEN_SECONDS,
        )
    assert resumed.rates == down(start=4)


def test_more_time_at_a_resume_extends_the_schedule(clock: Any, tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(
        Recorded(clock),
        LearningRateScheduler(Linear()),
        saves,
        enable_checkpointing=True,
        max_time=TEN_SECONDS,
    )
    resumed = Recorded(clock)
    with pytest.warns(UserWarning, match=r"learning rate jumps .*: 0.6 → 0.8"):
        fit(
            resumed,
            LearningRateScheduler(Linear(), on_resume="extend"),
            ckpt=tmp_path / "step=4.ckpt",
            max_time="00:00:00:20",
        )
    assert resumed.rates == down(20, start=4, stop=20)


@pytest.mark.parametrize("at", [4, 10])
def test_checkpoint_of_a_time_that_continues_under_max_steps(
    clock: Any, tmp_path: Path, at: int
) -> None:
    path, resumed = tmp_path / "one.ckpt", Recorded(clock)
    fit(Recorded(clock), LearningRateScheduler(Linear()), SaveAt(path, at), max_time=TEN_SECONDS)
    outcome = "the run ends after 10 seconds of training, or after 25 steps if that is earlier"
    if at == 10:
        outcome = "this time is over, so that no update is trained"
    match = rf"for 10 seconds, .* set to 25 steps.*: {outcome}\. Pass on_resume='extend'"
    with pytest.warns(UserWarning, match=match):
        fit(resumed, LearningRateScheduler(Linear()), ckpt=path, max_steps=25)
    assert resumed.rates == down(start=at)


@pytest.mark.parametrize("at", [4, 10])
def test_checkpoint_of_max_steps_that_continues_under_a_time(
    clock: Any, tmp_path: Path, at: int
) -> None:
    path, resumed = tmp_path / "one.ckpt", Recorded(clock)
    fit(Recorded(clock), LearningRateScheduler(Linear()), SaveAt(path, at), max_steps=10)
    outcome = "after 10 steps every update uses the last .*, if 10 seconds are longer, which is 0"
    if at == 10:
        outcome = "its schedule has ended, so that every update uses the last .*, which is 0"
    match = rf"for 10 steps, .* set to 10 seconds.*: {outcome} for most schedules\. Pass on_resume"
    with pytest.warns(UserWarning, match=match):
        fit(resumed, LearningRateScheduler(Linear()), ckpt=path, max_time=TEN_SECONDS)
    right = [max(0.0, 1 - (at + step) / 10) for step in range(10)]
    assert resumed.rates == pytest.approx(right, abs=1e-12)


def test_plan_reports_that_the_number_of_updates_is_unknown(clock: Any) -> None:
    trainer = L.Trainer(**QUIET, max_time=TEN_SECONDS, callbacks=[LearningRateScheduler(Linear())])
    planned = plan(trainer, Recorded(clock))
    assert any("speed of the machine" in warning for warning in planned.warnings)
    rates = [row.learning_rates["lr"] for row in planned.rows]
    assert rates == pytest.approx([1 - row.fraction for row in planned.rows])


@pytest.mark.parametrize("options", [{"min_steps": 20}, {"min_epochs": 2}])
def test_minimum_beyond_the_time_is_refused(clock: Any, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must not have a minimum with max_time of 10 seconds"):
        fit(Recorded(clock), LearningRateScheduler(Linear()), max_time=TEN_SECONDS, **options)


def test_timer_that_waits_for_the_end_of_the_epoch_does_not_drive_a_schedule(clock: Any) -> None:
    timer = Timer(TEN_SECONDS, interval="epoch")
    with pytest.raises(ValueError, match="the length of the training must be known"):
        fit(Recorded(clock), timer, LearningRateScheduler(Linear()), max_epochs=-1)


def test_fast_dev_run_accepts_times(clock: Any) -> None:
    schedule = WarmupStableDecay(warmup="2 s", decay="5 s")
    module = Recorded(clock)
    fit(module, LearningRateScheduler(schedule), max_time=TEN_SECONDS, fast_dev_run=True)
    assert len(module.rates) == 1
