"""Log lines and warnings about what changed between a checkpoint and the resumed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_bigopt import (
    Constant,
    Cosine,
    LearningRateScheduler,
    Linear,
)
from tests.callbacks.resume_helpers import WSD, fit, resume_report, save_every_update
from tests.helpers import Probe

# --------------------------------------------------------------------------------- what changed


def test_changed_schedule_is_used_and_reported(tmp_path: Path, info_log: Any) -> None:
    folder = save_every_update(tmp_path, LearningRateScheduler(Constant()))
    module = Probe(lr=1.0)
    with pytest.warns(UserWarning, match=r"jumps when the run is resumed: 1 → 0\.5"):
        fit(module, LearningRateScheduler(Linear()), ckpt=folder / "step=10.ckpt")
    assert module.lrs == [1 - t / 20 for t in range(10, 20)]
    assert "schedule: Constant(" in resume_report(info_log)
    assert "→ Linear(start=1.0, end=0.0)" in resume_report(info_log)


@pytest.mark.parametrize("owner", ["checkpoint", "config"])
def test_base_lr_chooses_checkpoint_or_config(tmp_path: Path, owner: Any, info_log: Any) -> None:
    folder = save_every_update(tmp_path, LearningRateScheduler(Cosine()), lr=1.0)
    module = Probe(lr=3.0)
    scheduler = LearningRateScheduler(Cosine(), base_lr=owner)
    if owner == "config":
        with pytest.warns(UserWarning, match=r"jumps .* \(× 3\)"):
            fit(module, scheduler, ckpt=folder / "step=5.ckpt")
        assert "base_lrs: 1 → 3" in resume_report(info_log)
    else:
        fit(module, scheduler, ckpt=folder / "step=5.ckpt")
        assert not resume_report(info_log)
    base = 3.0 if owner == "config" else 1.0
    assert module.lrs == [base * factor for factor in Cosine().values(20)[5:]]


def test_unchanged_run_reports_nothing(tmp_path: Path, info_log: Any) -> None:
    folder = save_every_update(tmp_path, LearningRateScheduler(WSD))
    fit(Probe(lr=1.0), LearningRateScheduler(WSD), ckpt=folder / "step=13.ckpt")
    assert not resume_report(info_log)


def test_checkpoint_without_the_scheduler_uses_the_configured_learning_rate(
    tmp_path: Path,
) -> None:
    folder = save_every_update(tmp_path, None, lr=9.0)
    module = Probe(lr=1.0)
    with pytest.warns(UserWarning, match=r"without LearningRateScheduler.* at 25\.0%.*\(1\)"):
        fit(module, LearningRateScheduler(Linear()), ckpt=folder / "step=5.ckpt")
    assert module.lrs == [1 - t / 20 for t in range(5, 20)]


def test_checkpoint_resumes_without_the_scheduler(tmp_path: Path) -> None:
    folder = save_every_update(tmp_path, LearningRateScheduler(Linear()), lr=1.0)
    module = Probe(lr=9.0)
    fit(module, None, ckpt=folder / "step=5.ckpt")
    assert module.lrs == [0.75] * 15  # the optimizer's own state
