"""A resume from a checkpoint of a validation keeps the points of the update before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_bigopt import LearningRateScheduler, Linear, OptimizationMonitor
from tests.engine.test_saving import ModuleWithValidation, SavesIn
from tests.faults.run_differences import scalars
from tests.helpers import QUIET, ResumableLoader, loader


@pytest.mark.parametrize("at", [4, 6])  # within an epoch, and at its end
@pytest.mark.parametrize(
    "hook", ["on_validation_start", "on_validation_batch_end", "on_validation_end"]
)
def test_resumed_run_logs_every_update_once(tmp_path: Path, hook: str, at: int) -> None:
    def train(*callbacks: Any, **resume: Any) -> None:
        own = [LearningRateScheduler(Linear(start=1.0, end=0.0)), OptimizationMonitor(), *callbacks]
        options: dict[str, Any] = {"max_epochs": 2, "val_check_interval": 4, **QUIET}
        options["logger"] = TensorBoardLogger(tmp_path, name="", version="log")
        trainer = L.Trainer(
            **options, accumulate_grad_batches=2, log_every_n_steps=1, callbacks=own
        )
        trainer.fit(ModuleWithValidation(), ResumableLoader(24, 2), loader(4, 2), **resume)

    saves = SavesIn(tmp_path / "saved.ckpt", hook, at=at)
    train(saves)
    assert saves.saved_at == at
    straight = scalars(tmp_path)["optim/lr"]
    assert [step for step, _ in straight] == list(range(12))
    for path in (tmp_path / "log").glob("events*"):  # of the same second as those of the resume
        path.rename(path.with_name("events.out.tfevents.0000000000.first"))
    train(ckpt_path=tmp_path / "saved.ckpt", weights_only=True)
    assert scalars(tmp_path)["optim/lr"] == straight
