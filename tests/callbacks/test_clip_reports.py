"""GradientClipping.reports(): counts of clipped updates, compared with counts of the norms."""

from __future__ import annotations

import logging
import math
import statistics
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_bigopt import (
    AdaGC,
    AutoClip,
    GradientClipping,
    Groups,
    NonFinite,
    NormClip,
    PerParameterNormClip,
    StepGuard,
    ValueClip,
    ZClip,
)
from tests.bad_batches import BadBatchModule
from tests.helpers import QUIET, ResumableLoader, cpu_precision


class RecordsNorms(BadBatchModule):
    """Records the norms before clipping, at the end of every backward pass."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.total_norms: list[float] = []
        self.tensor_norms: list[list[float]] = []

    def on_after_backward(self) -> None:
        self.tensor_norms.append([float(p.grad.norm()) for p in self.parameters()])
        self.total_norms.append(math.sqrt(sum(norm**2 for norm in self.tensor_norms[-1])))


def fit(module: L.LightningModule, *callbacks: Any, size: int = 80, **options: Any) -> L.Trainer:
    ckpt = options.pop("ckpt_path", None)
    trainer = L.Trainer(**{**QUIET, "max_epochs": 1, "callbacks": list(callbacks), **options})
    trainer.fit(module, ResumableLoader(size, 2), ckpt_path=ckpt)
    return trainer


def only_report(clipping: GradientClipping) -> Any:
    (report,) = clipping.reports().values()
    return report


def test_clipped_updates_are_counted() -> None:
    module = RecordsNorms({}, lr=0.01)
    clipping = GradientClipping(NormClip(max_norm=0.8))
    fit(module, clipping)
    report = only_report(clipping)
    clipped = sum(norm + 1e-6 > 0.8 for norm in module.total_norms)
    assert 5 < clipped < 35
    assert (report.updates, report.clipped) == (40, clipped)
    assert report.threshold == 0.8
    assert report.median == pytest.approx(statistics.median(module.total_norms), rel=1e-5)
    assert report.p95 == pytest.approx(sorted(module.total_norms)[38], rel=1e-5)


def test_rule_with_a_coefficient_per_tensor_counts_tensors() -> None:
    module = RecordsNorms({}, lr=0.01)
    clipping = GradientClipping(PerParameterNormClip(max_norm=0.5))
    fit(module, clipping)
    shares = [
        sum(norm + 1e-6 > 0.5 for norm in norms) / len(norms) for norms in module.tensor_norms
    ]
    assert only_report(clipping).clipped == pytest.approx(sum(shares))
    assert 0 < sum(shares) < 40


def test_groups_are_counted_separately() -> None:
    module = RecordsNorms({}, lr=0.01)
    rule = Groups({"net.0.*": NormClip(max_norm=0.5), "net.2.bias": None, "*": ZClip(warmup=5)})
    clipping = GradientClipping(rule)
    fit(module, clipping)
    reports = clipping.reports()
    assert list(reports) == [("", "net.0.*"), ("", "*")]
    mine = [math.hypot(*norms[:2]) for norms in module.tensor_norms]
    assert reports["", "net.0.*"].clipped == sum(norm + 1e-6 > 0.5 for norm in mine)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (NormClip(max_norm=1e-3), "More than half of the updates are clipped"),
        (NormClip(max_norm=1e3), "No update was clipped"),
        (ZClip(max_norm=1e-3), "More than half of the updates are clipped"),
        (ZClip(max_norm=None, z_threshold=99.0), None),
        (AutoClip(percentile=10), None),
        (AdaGC(warmup=5), None),
    ],
)
def test_report_at_the_end_of_a_fit_has_advice(
    rule: Any, words: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        fit(RecordsNorms({}, lr=0.01), GradientClipping(rule))
    (line,) = [r.message for r in caplog.records if "updates clipped" in r.message]
    assert line.startswith(type(rule).__name__)
    if words is None:
        assert "clipped:" not in line
    else:
        assert words in line


def test_no_advice_after_four_updates(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(RecordsNorms({}), GradientClipping(NormClip(max_norm=1e-3)), size=8)
    assert "100.0 % of 4 updates clipped" in caplog.text
    assert "More than half" not in caplog.text


def test_report_is_logged_after_an_error(caplog: pytest.LogCaptureFixture) -> None:
    guard = StepGuard([NonFinite()], max_consecutive=1)
    with caplog.at_level(logging.INFO), pytest.raises(RuntimeError, match="rejected"):
        fit(RecordsNorms({6: math.nan}), GradientClipping(NormClip(max_norm=1e-3)), guard)
    assert "of 6 updates clipped" in caplog.text
    assert "StepGuard rejected 1 update" in caplog.text


def test_value_clip_has_no_report(caplog: pytest.LogCaptureFixture) -> None:
    clipping = GradientClipping(ValueClip(max_abs=0.1))
    with caplog.at_level(logging.INFO):
        fit(RecordsNorms({}), clipping, size=8)
    assert clipping.reports() == {}
    assert "updates clipped" not in caplog.text


def test_non_finite_norms_are_not_counted() -> None:
    module = RecordsNorms({3: math.nan, 5: math.inf}, lr=0.01, optimizer=torch.optim.AdamW)
    clipping = GradientClipping(NormClip(max_norm=0.8))
    fit(module, clipping, **cpu_precision("16-mixed"))
    report = only_report(clipping)
    assert report.updates == 38
    assert math.isfinite(report.median)
    saved = clipping.saved_state()["audit"][""][""]
    assert all(math.isfinite(norm) for norm in saved["norms"])


def test_counts_continue_after_a_resume(tmp_path: Path) -> None:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 17:
                trainer.save_checkpoint(tmp_path / "k.ckpt")

    straight, resumed = (GradientClipping(NormClip(max_norm=0.8)) for _ in range(2))
    fit(RecordsNorms({}, lr=0.01), straight, Save())
    torch.load(tmp_path / "k.ckpt", weights_only=True)
    fit(RecordsNorms({}, lr=0.01), resumed, ckpt_path=tmp_path / "k.ckpt")
    assert only_report(resumed) == only_report(straight)
