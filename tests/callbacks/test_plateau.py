"""ReduceOnPlateau with any schedule, compared with torch's ReduceLROnPlateau."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_bigopt import (
    Clamp,
    Constant,
    LearningRateScheduler,
    Linear,
    Product,
    ReduceOnPlateau,
    WarmupCosine,
)
from tests.helpers import QUIET, Probe, ResumableLoader, SaveAt, loader

METRICS = [5.0, 4.0, 4.0, 4.5, 3.9999, 3.0, 3.5, 3.5, 3.5, 3.5, 2.0, 2.0, 2.0, 2.0]
OPTIONS: dict[str, Any] = {"factor": 0.5, "patience": 1, "threshold": 1e-3, "cooldown": 1}


class LogsGivenMetric(Probe):
    """Logs a given metric at every validation, chosen by the batches trained so far."""

    def __init__(self, metrics: list[float] = METRICS, *, every: int = 4, **options: Any) -> None:
        super().__init__(**options)
        self.metrics, self.every = metrics, every

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            done = self.trainer.fit_loop.total_batch_idx + 1
            self.log("val_loss", self.metrics[done // self.every - 1])


def fit(
    module: L.LightningModule,
    *callbacks: Any,
    ckpt: Any = None,
    validation: Any = True,
    **options: Any,
) -> L.Trainer:
    settings = {**QUIET, "max_epochs": 14, "callbacks": list(callbacks), **options}
    trainer = L.Trainer(**settings)
    trainer.fit(
        module,
        ResumableLoader(8, 2),
        loader(2, 2) if validation else None,
        ckpt_path=ckpt,
        weights_only=True if ckpt else None,
    )
    return trainer


def torch_factors(metrics: list[float], **options: Any) -> list[float]:
    """Returns torch's learning rate after each metric, starting at 1."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = ReduceLROnPlateau(optimizer, **options)
    found = []
    for metric in metrics:
        scheduler.step(metric)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("schedule", [Constant(), Linear(end=0.1), WarmupCosine(warmup="40%")])
def test_checks_at_epochs_reduce_as_torch_does_with_any_schedule(schedule: Any) -> None:
    module = LogsGivenMetric(lr=1.0)
    fit(module, LearningRateScheduler(schedule), ReduceOnPlateau("val_loss", **OPTIONS))
    factors = [1.0, *torch_factors(METRICS, **OPTIONS)]
    assert len(set(factors)) > 3
    assert module.lrs == [
        pytest.approx(schedule(t / 56) * factors[t // 4], rel=1e-15) for t in range(56)
    ]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_checks_at_steps_act_from_the_next_update(accumulate: int) -> None:
    module = LogsGivenMetric(lr=1.0, every=2)
    fit(
        module,
        LearningRateScheduler(Constant()),
        ReduceOnPlateau("val_loss", **OPTIONS),
        val_check_interval=2,
        max_epochs=7,
        accumulate_grad_batches=accumulate,
    )
    factors = [1.0, *torch_factors(METRICS, **OPTIONS)]
    updates = 28 // accumulate
    assert module.lrs == [factors[t * accumulate // 2] for t in range(updates)]


def test_training_metric_is_checked_when_the_epoch_ends() -> None:
    class Logged(Probe):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("train_loss", METRICS[self.current_epoch], on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    module = Logged(lr=1.0)
    fit(
        module,
        LearningRateScheduler(Constant()),
        ReduceOnPlateau("train_loss", check="train_epoch", **OPTIONS),
        validation=False,
    )
    factors = [1.0, *torch_factors(METRICS, **OPTIONS)]
    assert module.lrs == [factors[t // 4] for t in range(56)]


@pytest.mark.parametrize("when", ["batch", "validation"])
@pytest.mark.parametrize("stop", [2, 6, 13, 22])
def test_resume_gives_the_same_learning_rates_and_weights(
    tmp_path: Path, when: str, stop: int
) -> None:
    """Checkpoints are saved between two validations, and after each validation."""

    def callbacks() -> list[Any]:
        return [
            ReduceOnPlateau("val_loss", **OPTIONS),
            LearningRateScheduler(WarmupCosine(warmup="30%", end=0.1)),
        ]

    every = 4 if when == "batch" else 2
    options: dict[str, Any] = {"max_epochs": 14 if every == 4 else 7}
    if every == 2:
        options["val_check_interval"] = 2
    trigger: dict[str, Any] = (
        {"every_n_train_steps": 1}
        if when == "batch"
        else {"every_n_epochs": 1, "save_on_train_epoch_end": False}
    )
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **trigger)
    straight = LogsGivenMetric(every=every)
    fit(straight, *callbacks(), checkpoint, enable_checkpointing=True, **options)
    stop += stop % 2 if when == "validation" else 0
    resumed = LogsGivenMetric(every=every)
    fit(resumed, *callbacks(), ckpt=tmp_path / f"step={stop}.ckpt", **options)
    assert resumed.lrs == straight.lrs[stop:]
    for mine, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_non_finite_metrics_are_ignored() -> None:
    noisy = [5.0, float("nan"), 5.0, float("inf"), 4.0, 4.0, float("-inf"), 4.0, 3.0, 2.0, 1.0]
    module = LogsGivenMetric(noisy, lr=1.0)
    fit(
        module,
        LearningRateScheduler(Constant()),
        ReduceOnPlateau("val_loss", factor=0.5, patience=1),
        max_epochs=len(noisy),
    )
    kept = [value for value in noisy if value - value == 0]
    factors = torch_factors(kept, factor=0.5, patience=1)
    seen, at = [1.0], -1
    for value in noisy:
        at += value - value == 0
        seen.append(factors[at])
    assert module.lrs == [seen[t // 4] for t in range(4 * len(noisy))]


def test_mode_max_and_min_factor() -> None:
    module = LogsGivenMetric([1.0] * 14, lr=1.0)
    options: dict[str, Any] = {"factor": 0.5, "patience": 0, "mode": "max"}
    fit(
        module,
        LearningRateScheduler(Constant()),
        ReduceOnPlateau("val_loss", min_factor=0.2, **options),
    )
    assert min(module.lrs) == 0.2
    factors = [1.0, *torch_factors([1.0] * 14, min_lr=0.2, **options)]
    assert module.lrs == [factors[t // 4] for t in range(56)]


def test_validate_and_the_sanity_check_are_not_counted() -> None:
    module, plateau = LogsGivenMetric(lr=1.0), ReduceOnPlateau("val_loss", patience=0, factor=0.5)
    trainer = fit(
        module,
        LearningRateScheduler(Constant()),
        plateau,
        max_epochs=2,
        num_sanity_val_steps=1,
    )
    before = plateau.state_dict()
    assert before["best"] == 4.0
    trainer.validate(module, loader(2, 2), verbose=False)
    assert plateau.state_dict() == before


def test_metric_that_is_not_logged_raises_at_the_first_check() -> None:
    module = LogsGivenMetric()
    with pytest.raises(ValueError, match=r"monitor must be a logged metric, got 'loss'.*val_loss"):
        fit(module, LearningRateScheduler(Constant()), ReduceOnPlateau("loss"))
    assert len(module.lrs) == 4


def test_fit_without_validation_warns_before_the_first_batch() -> None:
    started: list[int] = []

    class Notes(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            started.append(len(caught))

    plateau = ReduceOnPlateau("val_loss")
    with pytest.warns(
        UserWarning, match=r"never reduce the learning rate.*has no validation"
    ) as caught:
        fit(
            Probe(),
            LearningRateScheduler(Constant()),
            plateau,
            Notes(),
            validation=False,
            max_epochs=1,
        )
    assert started[0] == len(caught)  # only once
    assert sum("ReduceOnPlateau" in str(warning.message) for warning in caught) == 1


def test_fit_that_ends_before_the_first_validation_warns() -> None:
    callbacks = [LearningRateScheduler(Constant()), ReduceOnPlateau("val_loss")]
    with pytest.warns(UserWarning, match=r"has never checked its metric"):
        fit(LogsGivenMetric(), *callbacks, max_epochs=1, check_val_every_n_epoch=2)


def test_metric_of_the_training_needs_no_validation(recwarn: pytest.WarningsRecorder) -> None:
    class Logs(Probe):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    plateau = ReduceOnPlateau("loss", check="train_epoch")
    fit(Logs(), LearningRateScheduler(Constant()), plateau, validation=False, max_epochs=1)
    assert not [warning for warning in recwarn if "ReduceOnPlateau" in str(warning.message)]


def test_missing_learning_rate_scheduler_raises() -> None:
    with pytest.raises(ValueError, match=r"LearningRateScheduler\(Constant\(\)\)"):
        fit(LogsGivenMetric(), ReduceOnPlateau("val_loss"))


def test_state_is_reset_for_another_trainer() -> None:
    plateau = ReduceOnPlateau("val_loss", patience=0, factor=0.5)
    first, second = LogsGivenMetric([1.0] * 3, lr=1.0), LogsGivenMetric([1.0] * 3, lr=1.0)
    for module in (first, second):
        fit(module, LearningRateScheduler(Constant()), plateau, max_epochs=3)
    assert first.lrs == second.lrs
    assert second.lrs[-1] < 1.0


def test_copies_and_pickles_keep_the_state() -> None:
    plateau = ReduceOnPlateau("val_loss", patience=0, factor=0.5)
    fit(LogsGivenMetric([1.0] * 3), LearningRateScheduler(Constant()), plateau, max_epochs=3)
    for copied in (copy.deepcopy(plateau), pickle.loads(pickle.dumps(plateau))):
        assert copied.factor == plateau.factor == 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 1.0}, r"factor must be in \(0, 1\), got 1.0"),
        ({"patience": -1}, "patience must be a non-negative number of checks, got -1"),
        ({"cooldown": 0.5}, "cooldown must be a non-negative number of checks, got 0.5"),
        ({"min_factor": 1.0}, r"min_factor must be in \[0, 1\), got 1.0"),
        ({"mode": "less"}, "mode must be 'min' or 'max', got 'less'"),
        ({"threshold_mode": "x"}, "threshold_mode must be 'rel' or 'abs', got 'x'"),
        ({"check": "step"}, "check must be 'validation' or 'train_epoch', got 'step'"),
    ],
)
def test_invalid_arguments_raise_with_their_names(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReduceOnPlateau("val_loss", **options)


@pytest.mark.parametrize("monitor", [3, None, ["val_loss"]])
def test_monitor_must_be_a_name(monitor: Any) -> None:
    message = rf"^monitor must be a str, got {re.escape(repr(monitor))}; write the name of a logged"
    with pytest.raises(ValueError, match=message):
        ReduceOnPlateau(monitor)


# ------------------------------------------------------------------ runs of unknown length


class Endless:
    """A loader without a length."""

    batch_size = 2

    def __iter__(self) -> Any:
        return iter(list(ResumableLoader(8, 2)))


class StopsAt(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


@pytest.mark.parametrize("kind", ["no limit", "no length"])
@pytest.mark.parametrize(
    "schedule",
    [Constant(), Constant(0.5), Product([Constant(0.5), Constant()]), Clamp(Constant(), high=0.5)],
    ids=repr,
)
def test_constant_schedule_needs_no_length_of_the_run(kind: str, schedule: Any) -> None:
    """The learning rates are those of torch's ReduceLROnPlateau, on the schedule's level."""
    level, steps = schedule(0.0), 4 * len(METRICS)
    options: dict[str, Any] = {"max_epochs": -1, "max_steps": -1}
    data: Any = ResumableLoader(8, 2)
    if kind == "no length":
        options, data = {"max_epochs": len(METRICS)}, Endless()
    module = LogsGivenMetric(lr=0.8)
    plateau = ReduceOnPlateau("val_loss", **OPTIONS)
    bounds = LearningRateScheduler(schedule, min_lr=0.15, max_lr=0.7)
    trainer = L.Trainer(**QUIET, **options, callbacks=[bounds, plateau, StopsAt(steps)])
    trainer.fit(module, data, loader(2, 2))
    reference = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.8 * level)
    torch_plateau = ReduceLROnPlateau(reference, **OPTIONS, eps=0.0)
    expected = []
    for metric in METRICS:
        rate = reference.param_groups[0]["lr"]
        expected += [max(min(rate, 0.7), 0.15)] * 4
        torch_plateau.step(metric)
    assert module.lrs == pytest.approx(expected)
    assert min(expected) == 0.15


def test_schedule_that_depends_on_the_end_still_needs_it() -> None:
    product = Product([Constant(), Linear()])
    for scheduler in (
        LearningRateScheduler(product),
        LearningRateScheduler(Constant(), groups={"decay": Linear()}),
        LearningRateScheduler(Constant(), on_resume="cooldown", cooldown="20%"),
    ):
        module = Probe()
        with pytest.raises(ValueError, match="the length of the training must be known"):
            fit(module, scheduler, max_epochs=-1, max_steps=-1, validation=False)
        assert module.lrs == []


def test_resume_of_a_constant_schedule_without_limits_to_the_bit(tmp_path: Path) -> None:
    def run(ckpt: Any, *more: Any) -> Any:
        module = LogsGivenMetric(lr=0.8)
        plateau = ReduceOnPlateau("val_loss", **OPTIONS)
        scheduler = LearningRateScheduler(Constant(0.5))
        options = {"max_epochs": -1, "max_steps": -1, "enable_checkpointing": bool(more)}
        fit(module, scheduler, plateau, StopsAt(56), *more, ckpt=ckpt, **options)
        return module

    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    straight = run(None, checkpoint)
    resumed = run(tmp_path / "step=30.ckpt")
    assert resumed.lrs == straight.lrs[30:]
    for mine, other in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_checkpoint_in_a_cooldown_continues_it_with_a_constant_schedule(tmp_path: Path) -> None:
    def run(scheduler: Any, ckpt: Any, *more: Any) -> Probe:
        module = Probe(lr=1.0)
        fit(module, scheduler, *more, ckpt=ckpt, validation=False, max_epochs=5)
        return module

    run(LearningRateScheduler(Constant()), None, SaveAt(tmp_path / "10", 10))
    branch = LearningRateScheduler(
        Constant(), on_resume="cooldown", cooldown="8 steps", cooldown_shape="linear"
    )
    straight = run(branch, tmp_path / "10", SaveAt(tmp_path / "13", 13))
    resumed = run(LearningRateScheduler(Constant(), cooldown_shape="linear"), tmp_path / "13")
    assert straight.lrs == pytest.approx([1 - t / 8 for t in range(8)])
    assert resumed.lrs == straight.lrs[3:]
