"""What the audit says of a fit's clipping, against counts made by hand."""

from __future__ import annotations

import itertools
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
from lightning_bigopt.controllers.audit import ClipAudit
from lightning_bigopt.gradients import ClipDecision, GradientNorms
from tests.kit import QUIET, ResumableLoader, cpu_precision
from tests.poison import Poisoned


class Truth(Poisoned):
    """Every update's norms before clipping, measured at the end of the backward pass."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.true: list[float] = []
        self.each: list[list[float]] = []

    def on_after_backward(self) -> None:
        self.each.append([float(p.grad.norm()) for p in self.parameters()])
        self.true.append(math.sqrt(sum(norm**2 for norm in self.each[-1])))


def fit(module: L.LightningModule, *callbacks: Any, size: int = 80, **options: Any) -> L.Trainer:
    ckpt = options.pop("ckpt_path", None)
    trainer = L.Trainer(**{**QUIET, "max_epochs": 1, "callbacks": list(callbacks), **options})
    trainer.fit(module, ResumableLoader(size, 2), ckpt_path=ckpt)
    return trainer


def only(clipping: GradientClipping) -> Any:
    (report,) = clipping.controller.reports().values()
    return report


def test_it_counts_what_was_clipped() -> None:
    module = Truth({}, lr=0.01)
    clipping = GradientClipping(NormClip(max_norm=0.8))
    fit(module, clipping)
    report = only(clipping)
    clipped = sum(norm + 1e-6 > 0.8 for norm in module.true)
    assert 5 < clipped < 35
    assert (report.updates, report.clipped) == (40, clipped)
    assert report.threshold == 0.8
    assert report.median == pytest.approx(statistics.median(module.true), rel=1e-5)
    assert report.high == pytest.approx(sorted(module.true)[38], rel=1e-5)


def test_a_coefficient_for_each_tensor_counts_tensors() -> None:
    module = Truth({}, lr=0.01)
    clipping = GradientClipping(PerParameterNormClip(max_norm=0.5))
    fit(module, clipping)
    shares = [sum(norm + 1e-6 > 0.5 for norm in norms) / len(norms) for norms in module.each]
    assert only(clipping).clipped == pytest.approx(sum(shares))
    assert 0 < sum(shares) < 40


def test_groups_are_counted_apart() -> None:
    module = Truth({}, lr=0.01)
    rule = Groups({"net.0.*": NormClip(max_norm=0.5), "net.2.bias": None, "*": ZClip(warmup=5)})
    clipping = GradientClipping(rule)
    fit(module, clipping)
    reports = clipping.controller.reports()
    assert list(reports) == [("", "net.0.*"), ("", "*")]
    mine = [math.hypot(*norms[:2]) for norms in module.each]
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
def test_advice_is_given_at_the_end(
    rule: Any, words: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        fit(Truth({}, lr=0.01), GradientClipping(rule))
    (line,) = [r.message for r in caplog.records if "updates clipped" in r.message]
    assert line.startswith(type(rule).__name__)
    if words is None:
        assert "clipped:" not in line
    else:
        assert words in line


def test_no_advice_after_a_few_updates(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(Truth({}), GradientClipping(NormClip(max_norm=1e-3)), size=8)
    assert "100.0 % of 4 updates clipped" in caplog.text
    assert "More than half" not in caplog.text


def test_it_is_said_of_a_fit_that_fails_too(caplog: pytest.LogCaptureFixture) -> None:
    guard = StepGuard([NonFinite()], max_consecutive=1)
    with caplog.at_level(logging.INFO), pytest.raises(RuntimeError, match="rejected"):
        fit(Truth({6: math.nan}), GradientClipping(NormClip(max_norm=1e-3)), guard)
    assert "of 6 updates clipped" in caplog.text
    assert "StepGuard rejected 1 update" in caplog.text


def test_rules_on_entries_have_nothing_to_count(caplog: pytest.LogCaptureFixture) -> None:
    clipping = GradientClipping(ValueClip(max_abs=0.1))
    with caplog.at_level(logging.INFO):
        fit(Truth({}), clipping, size=8)
    assert clipping.controller.reports() == {}
    assert "updates clipped" not in caplog.text


def test_what_is_not_finite_is_not_counted() -> None:
    module = Truth({3: math.nan, 5: math.inf}, lr=0.01, optimizer=torch.optim.AdamW)
    clipping = GradientClipping(NormClip(max_norm=0.8))
    fit(module, clipping, **cpu_precision("16-mixed"))
    report = only(clipping)
    assert report.updates == 38
    assert math.isfinite(report.median)
    saved = clipping.controller.state_dict()["audit"][""][""]
    assert all(math.isfinite(norm) for norm in saved["norms"])


def test_the_counts_go_on_after_a_resume(tmp_path: Path) -> None:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 17:
                trainer.save_checkpoint(tmp_path / "k.ckpt")

    straight, resumed = (GradientClipping(NormClip(max_norm=0.8)) for _ in range(2))
    fit(Truth({}, lr=0.01), straight, Save())
    torch.load(tmp_path / "k.ckpt", weights_only=True)
    fit(Truth({}, lr=0.01), resumed, ckpt_path=tmp_path / "k.ckpt")
    assert only(resumed) == only(straight)


# --------------------------------------------------------------------------- the audit alone


def on_device(norm: float) -> GradientNorms:
    total = torch.tensor(norm)
    return GradientNorms(
        names=("w",), per_tensor=total.view(1), total=total, finite=total.isfinite()
    )


def on_host(norm: float) -> GradientNorms:
    return GradientNorms.of_numbers([("w", torch.nn.Parameter(torch.zeros(1)))], [norm], 2.0)


WHERE = pytest.mark.parametrize("where", [on_device, on_host])


def feed(audit: ClipAudit, norms: list[float], limit: float, where: Any = on_device) -> None:
    for norm in norms:
        coefficient = (limit / torch.tensor(norm)).clamp(max=1.0)
        audit.add(ClipDecision(norms=where(norm), coefficient=coefficient, threshold=limit))


@WHERE
@pytest.mark.parametrize("cut", [0, 1, 63, 64, 700, 4999])
def test_memory_is_bounded_and_the_sample_is_even(cut: int, where: Any) -> None:
    norms = [1.0 + i / 5000 for i in range(5000)]
    whole, parts = ClipAudit(), ClipAudit()
    feed(whole, norms, 1.5, where)
    feed(parts, norms[:cut], 1.5, where)
    again = ClipAudit()
    again.load_state_dict(parts.state_dict())
    feed(again, norms[cut:], 1.5, where)
    assert again.report() == whole.report()
    report, kept = whole.report(), whole.state_dict()["norms"]
    assert (report.updates, report.clipped) == (5000, 2499)
    assert 256 <= len(kept) <= 512
    steps = {round((b - a) * 5000) for a, b in itertools.pairwise(kept)}
    assert steps == {16}
    assert report.median == pytest.approx(1.5, abs=0.005)
    assert report.high == pytest.approx(1.95, abs=0.005)


def test_it_does_not_look_at_the_device_between_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("the host asked the device for a value")

    audit = ClipAudit()
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    feed(audit, [float(i + 1) for i in range(1000)], 500.0)
    monkeypatch.undo()
    assert audit.report().clipped == 500


@WHERE
def test_the_share_since_it_was_last_asked_is_of_finite_updates(where: Any) -> None:
    audit = ClipAudit()
    assert audit.take_share() is None
    feed(audit, [1.0, 3.0, math.nan, 3.0, math.inf], 2.0, where)
    assert audit.take_share() == pytest.approx(2 / 3)
    feed(audit, [1.0, 1.0], 2.0, where)
    again = ClipAudit()
    again.load_state_dict(audit.state_dict())
    feed(again, [1.0, 3.0], 2.0, where)
    assert again.take_share() == pytest.approx(1 / 4)
    assert not again.take_share()
    assert again.report().updates == 7
    assert again.report().clipped == 3


@WHERE
def test_a_run_that_moves_to_another_device_goes_on_counting(where: Any) -> None:
    audit = ClipAudit()
    feed(audit, [1.0, 3.0], 2.0, on_host if where is on_device else on_device)
    feed(audit, [3.0] * 70, 2.0, where)
    assert (audit.report().updates, audit.report().clipped) == (72, 71)
    assert sorted(audit.state_dict()["norms"]) == [1.0] + [3.0] * 71
