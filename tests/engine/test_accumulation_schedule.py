"""LearningRateScheduler beside Lightning's GradientAccumulationScheduler."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_bigopt import LearningRateScheduler, Linear, WarmupConstant, plan
from tests.helpers import QUIET, Probe, loader

LIMITS: list[dict[str, int]] = [
    {"max_epochs": 4, "max_steps": -1},
    {"max_epochs": 4, "max_steps": 15},
    {"max_epochs": 8, "max_steps": 10},
    {"max_epochs": -1, "max_steps": 15},
]


def run(schedule: Any, lengths: dict[int, int], **limits: int) -> tuple[Any, Probe, Any]:
    """Fits on epochs of 8 batches, after a plan."""
    trainer = L.Trainer(
        **{**QUIET, **limits},
        callbacks=[LearningRateScheduler(schedule), GradientAccumulationScheduler(dict(lengths))],
    )
    module = Probe(lr=1.0)
    found = plan(trainer, module, loader(32, 4), points=1000)
    trainer.fit(module, loader(32, 4))
    return trainer, module, found


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize(
    ("lengths", "warmup", "updates"),
    [
        ({0: 4, 2: 1}, "6 steps", 6),  # 2 epochs of 2 updates, then 2 of 8
        ({0: 4, 2: 1}, "2 epochs", 4),
        ({1: 2}, "10 steps", 10),  # 8 updates, then 4 an epoch
        ({1: 2}, "1 epoch", 8),
        ({0: 2}, "2 epochs", 8),
    ],
)
def test_warmup_ends_at_its_update(
    lengths: dict[int, int], warmup: str, updates: int, limits: dict[str, int]
) -> None:
    _, module, _ = run(WarmupConstant(warmup=warmup), lengths, **limits)
    assert all(rate < 1 for rate in module.lrs[:updates])
    assert module.lrs[updates:] == pytest.approx([1.0] * (len(module.lrs) - updates))


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("lengths", [{0: 4, 2: 1}, {1: 2}, {0: 2}])
def test_plan_equals_the_run_and_the_schedule_ends_with_it(
    lengths: dict[int, int], limits: dict[str, int]
) -> None:
    trainer, module, found = run(Linear(), lengths, **limits)
    assert found.totals["updates"] == trainer.global_step == len(module.lrs)
    assert [row.learning_rates["lr"] for row in found.rows] == pytest.approx(module.lrs)
    assert 0 < module.lrs[-1] <= 0.25


class Saves(L.Callback):
    """Saves a checkpoint after the third update, in the middle of the second epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 3 and not self.path.exists():
            trainer.save_checkpoint(self.path)


class Sets(L.Callback):
    """Sets the accumulation of the rest of an epoch, as the warning advises."""

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        trainer.accumulate_grad_batches = 4


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize("limits", LIMITS[:2])
@pytest.mark.parametrize("follows_advice", [False, True])
def test_resume_within_an_epoch_reports_the_accumulation_that_lightning_does_not_set(
    tmp_path: Path, limits: dict[str, int], follows_advice: bool
) -> None:
    path = tmp_path / "middle.ckpt"

    def trainer_of(*callbacks: Any) -> L.Trainer:
        accumulation = GradientAccumulationScheduler({0: 4, 2: 1})
        ours = [LearningRateScheduler(Linear()), accumulation]
        return L.Trainer(**{**QUIET, **limits}, callbacks=[*ours, *callbacks])

    straight, resumed = Probe(lr=1.0), Probe(lr=1.0)
    trainer_of(Saves(path)).fit(straight, loader(32, 4))
    seen: list[int] = []

    class Counts(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            seen.append(len(found))

    with warnings.catch_warnings(record=True) as found:
        warnings.filterwarnings("always", message="accumulate_grad_batches")
        trainer = trainer_of(*([Sets()] if follows_advice else []), Counts())
        trainer.fit(resumed, loader(32, 4), ckpt_path=path)
    texts = [str(warning.message) for warning in found]
    if follows_advice:
        assert not texts
        assert resumed.lrs == straight.lrs[3:]
        return
    (text,) = texts
    assert text.startswith("accumulate_grad_batches is 1 in the rest of epoch 1, but Gradient")
    assert "sets 4" in text
    assert seen[0] == 1  # before the first batch is trained
    # 4 batches of epoch 1 and 16 of later epochs, or up to update 15.
    assert len(resumed.lrs) == {-1: 20, 15: 12}[limits["max_steps"]]


class Accumulates(L.Callback):
    """Changes the accumulation in an epoch, as other callbacks do."""

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 2:
            trainer.accumulate_grad_batches = 4


def test_accumulation_that_another_callback_changes_is_reported_once() -> None:
    trainer = L.Trainer(
        **{**QUIET, "max_epochs": 4},
        callbacks=[LearningRateScheduler(Linear()), Accumulates()],
    )
    module = Probe(lr=1.0)
    with pytest.warns(UserWarning, match="^accumulate_grad_batches is 4 in epoch 2, but") as found:
        trainer.fit(module, loader(16, 2))
    texts = [str(warning.message) for warning in found]
    assert sum("accumulate_grad_batches" in text for text in texts) == 1
    # Under max_epochs the fraction is right for any accumulation.
    starts = [*range(16), 16, 20, 24, 28]
    assert module.lrs == pytest.approx([1 - start / 32 for start in starts])
