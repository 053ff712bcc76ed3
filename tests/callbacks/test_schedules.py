"""Schedules of named optimizers and of named parameter groups."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_bigopt import Constant, Cosine, LearningRateScheduler, Linear
from tests.helpers import QUIET, ManualLayers, ResumableLoader, SaveAt

DOWN = Linear(start=1.0, end=0.0)


def fit(module: L.LightningModule, *callbacks: Any, ckpt: Any = None, **options: Any) -> L.Trainer:
    trainer = L.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": list(callbacks), **options})
    trainer.fit(module, ResumableLoader(8, 2), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return trainer


def three_optimizers() -> ManualLayers:
    """Manual optimization of two optimizers of one class and a third."""
    return ManualLayers(
        lambda parameters: torch.optim.SGD([{"params": parameters, "name": "special"}], lr=1.0),
        partial(torch.optim.Adam, lr=0.1),
        partial(torch.optim.SGD, lr=2.0),
    )


def test_named_optimizers_have_their_own_schedules() -> None:
    module = three_optimizers()
    fit(module, LearningRateScheduler(DOWN, optimizers={"Adam": Constant(), "SGD-1": Cosine()}))
    assert module.seen == [(1 - t / 8, 0.1, 2.0 * Cosine()(t / 8)) for t in range(8)]


def test_group_schedule_overrides_optimizer_schedule() -> None:
    module = three_optimizers()
    scheduler = LearningRateScheduler(
        Cosine(), optimizers={"SGD-0": DOWN}, groups={"special": Constant()}
    )
    fit(module, scheduler)
    assert [rates[0] for rates in module.seen] == [1.0] * 8


@pytest.mark.parametrize("name", ["SGD", "SGD-2", "AdamW"])
def test_unknown_optimizer_raises_and_lists_the_known_ones(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"optimizers must name one of several.*'Adam', 'SGD-0', 'SGD-1'"
    ):
        fit(three_optimizers(), LearningRateScheduler(DOWN, optimizers={name: DOWN}))


def test_resume_under_manual_optimization_gives_the_same_learning_rates(tmp_path: Path) -> None:
    def scheduler() -> LearningRateScheduler:
        return LearningRateScheduler(DOWN, optimizers={"Adam": Cosine()})

    straight, resumed = three_optimizers(), three_optimizers()
    fit(straight, scheduler(), SaveAt(tmp_path / "nine.ckpt", 9))
    fit(resumed, scheduler(), ckpt=tmp_path / "nine.ckpt")  # three updates a batch
    assert resumed.seen == straight.seen[3:]
