"""A fit with checkpoints, for the tests of resumed learning-rate schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_bigopt import (
    WarmupStableDecay,
)
from tests.helpers import QUIET, Probe, ResumableLoader

WSD = WarmupStableDecay(warmup="10%", decay="20%", cooldown="linear")


def fit(
    module: L.LightningModule, scheduler: Any, *others: Any, ckpt: Any = None, **options: Any
) -> L.Trainer:
    callbacks = [*([] if scheduler is None else [scheduler]), *others]
    trainer = L.Trainer(**{**QUIET, "max_steps": 20, "callbacks": callbacks, **options})
    trainer.fit(module, ResumableLoader(8, 2), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return trainer


def save_every_update(
    tmp_path: Path, scheduler: Any, *, lr: float = 1.0, ckpt: Any = None, **options: Any
) -> Path:
    """Fits with a checkpoint after every update; returns their folder."""
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(Probe(lr=lr), scheduler, checkpoint, ckpt=ckpt, enable_checkpointing=True, **options)
    return tmp_path


def resume_report(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(r.getMessage() for r in caplog.records if "Changes since" in r.getMessage())
