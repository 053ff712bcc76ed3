"""LearningRateScheduler beside Lightning's GradientAccumulationScheduler."""

from __future__ import annotations

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
