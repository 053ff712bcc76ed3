"""Tags: the table of all tags, and the tags of parameter groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    GradientClipping,
    LearningRateScheduler,
    Linear,
    OptimizationMonitor,
    PerParameterNormClip,
    StepGuard,
    WarmupCosine,
)
from lightning_bigopt.monitoring.tags import TAGS, find_tag
from tests.helpers import Probe, fit, loader
from tests.monitoring.helpers import TAG_PREFIXES, Blocks, batch_tokens, curves

OTHERS = (
    *("memory/", "noise_scale/", "communication/", "rollback/", "stability/"),
    *("batch/branch_samples", "batch/doubling_cost"),
)


def test_tags_of_groups_have_their_names_and_the_used_values(tmp_path: Path) -> None:
    class Grouped(Probe):
        def configure_optimizers(self) -> Any:
            first, second = self.net[0], self.net[2]
            return torch.optim.AdamW(
                [
                    {"params": first.parameters(), "name": "body", "weight_decay": 0.3},
                    {"params": second.parameters(), "lr": 0.2},
                ],
                lr=0.1,
                betas=(0.8, 0.99),
            )

    module = Grouped()
    schedule = LearningRateScheduler(Linear(start=1.0, end=0.0))
    trainer = fit(
        module,
        loader(8, 2),
        OptimizationMonitor(every=1, layers=None),
        schedule,
        max_steps=4,
        logger=TensorBoardLogger(tmp_path),
    )
    logged = curves(trainer)
    rates = [1.0, 0.75, 0.5, 0.25]
    assert [v for _, v in logged["optim/lr/body"]] == pytest.approx([0.1 * r for r in rates])
    assert [v for _, v in logged["optim/lr/group1"]] == pytest.approx([0.2 * r for r in rates])
    assert logged["optim/lr/body"] == [(t, pytest.approx(v)) for t, v in logged["plan/lr/body"]]
    assert [v for _, v in logged["optim/weight_decay/body"]] == pytest.approx([0.3] * 4)
    assert [v for _, v in logged["optim/momentum/group1"]] == pytest.approx([0.8] * 4)


def test_groups_with_the_same_name_have_separate_tags(tmp_path: Path) -> None:
    class Grouped(Probe):
        def configure_optimizers(self) -> Any:
            first, second = self.net[0].parameters(), self.net[2].parameters()
            groups = [{"params": first, "name": "g"}, {"params": second, "name": "g", "lr": 0.2}]
            return torch.optim.SGD(groups, lr=0.1)

    trainer = fit(
        Grouped(),
        loader(8, 4),
        OptimizationMonitor(every=1),
        LearningRateScheduler(Linear(start=1.0, end=0.0)),
        max_steps=2,
        logger=TensorBoardLogger(tmp_path),
    )
    logged = curves(trainer)
    for kind in ("optim", "plan"):
        assert [value for _, value in logged[f"{kind}/lr/g-0"]] == pytest.approx([0.1, 0.05])
        assert [value for _, value in logged[f"{kind}/lr/g-1"]] == pytest.approx([0.2, 0.1])


def test_table_of_tags_is_complete(tmp_path: Path) -> None:
    logged: set[str] = set()
    module = Blocks(momentum=0.9)
    trainer = fit(
        module,
        loader(16, 2),
        LearningRateScheduler(WarmupCosine(warmup="20%")),
        GradientClipping(PerParameterNormClip(max_norm=0.5)),
        BatchSizeScheduler(BatchSizeSteps({"0%": 2, "50%": 4}), lr_scaling="sqrt"),
        StepGuard(),
        OptimizationMonitor(every=1, activations="blocks", histograms_every=2, tokens=batch_tokens),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    logged |= set(curves(trainer))
    folder = Path(trainer.log_dir)
    for file in folder.glob("events*"):
        for event in EventFileLoader(str(file)).Load():
            logged |= {value.tag for value in event.summary.value}
    ours = {tag for tag in logged if tag.startswith(TAG_PREFIXES) and "/text_summary" not in tag}
    assert {tag for tag in ours if find_tag(tag) is None} == set()
    never = {tag.name for tag in TAGS if not any(tag.matches(name) for name in ours)}
    elsewhere = {t.name for t in TAGS if t.name.startswith(OTHERS)}
    assert never == elsewhere  # on a GPU, with other callbacks, or after 64 updates
    assert len({tag.name for tag in TAGS}) == len(TAGS)
    for name in ours:
        assert sum(tag.matches(name) for tag in TAGS) == 1, name
    assert all(tag.meaning.endswith(".") and tag.unit for tag in TAGS)
