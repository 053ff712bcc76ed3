"""ClipStatistics: counts, stored norms, reports and advice."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_bigopt.gradients import (
    AutoClip,
    ClipDecision,
    ClippingRule,
    GradientNorms,
    NormClip,
    ZClip,
)
from lightning_bigopt.gradients.clip_statistics import ClipReport, ClipStatistics, advice
from lightning_bigopt.gradients.gradient_norms import DeviceNorms, HostNorms
from lightning_bigopt.gradients.norm_sample import Repetition


def on_device(norm: float) -> GradientNorms:
    total = torch.tensor(norm)
    return DeviceNorms(names=("w",), per_tensor=total.view(1), total=total, finite=total.isfinite())


def on_host(norm: float) -> GradientNorms:
    return HostNorms([("w", torch.nn.Parameter(torch.zeros(1)))], [norm], 2.0)


REPRESENTATIONS = pytest.mark.parametrize("where", [on_device, on_host])


def feed(
    statistics: ClipStatistics, norms: list[float], limit: float, where: Any = on_device
) -> None:
    for norm in norms:
        coefficient = (limit / torch.tensor(norm)).clamp(max=1.0)
        statistics.add(ClipDecision(norms=where(norm), coefficient=coefficient, threshold=limit))


@pytest.mark.slow
@REPRESENTATIONS
@pytest.mark.parametrize("cut", [0, 1, 63, 64, 700, 4999])
def test_stored_norms_are_bounded_and_evenly_spaced(cut: int, where: Any) -> None:
    norms = [1.0 + i / 5000 for i in range(5000)]
    whole, parts = ClipStatistics(), ClipStatistics()
    feed(whole, norms, 1.5, where)
    feed(parts, norms[:cut], 1.5, where)
    again = ClipStatistics()
    again.load_state_dict(parts.state_dict())
    feed(again, norms[cut:], 1.5, where)
    assert again.report() == whole.report()
    report, kept = whole.report(), whole.state_dict()["norms"]
    assert (report.updates, report.clipped) == (5000, 2499)
    assert 256 <= len(kept) <= 512
    steps = {round((b - a) * 5000) for a, b in itertools.pairwise(kept)}
    assert steps == {16}
    assert report.median == pytest.approx(1.5, abs=0.005)
    assert report.p95 == pytest.approx(1.95, abs=0.005)


def test_device_is_not_read_between_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("the host asked the device for a value")

    statistics = ClipStatistics()
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    feed(statistics, [float(i + 1) for i in range(1000)], 500.0)
    monkeypatch.undo()
    assert statistics.report().clipped == 500


@REPRESENTATIONS
def test_fraction_since_the_last_log_counts_finite_updates(where: Any) -> None:
    statistics = ClipStatistics()
    assert statistics.fraction_since_last_log() is None
    feed(statistics, [1.0, 3.0, math.nan, 3.0, math.inf], 2.0, where)
    assert statistics.fraction_since_last_log() == pytest.approx(2 / 3)
    feed(statistics, [1.0, 1.0], 2.0, where)
    again = ClipStatistics()
    again.load_state_dict(statistics.state_dict())
    feed(again, [1.0, 3.0], 2.0, where)
    assert again.fraction_since_last_log() == pytest.approx(1 / 4)
    assert not again.fraction_since_last_log()
    assert again.report().updates == 7
    assert again.report().clipped == 3


@REPRESENTATIONS
def test_counting_continues_on_another_device(where: Any) -> None:
    statistics = ClipStatistics()
    feed(statistics, [1.0, 3.0], 2.0, on_host if where is on_device else on_device)
    feed(statistics, [3.0] * 70, 2.0, where)
    assert (statistics.report().updates, statistics.report().clipped) == (72, 71)
    assert sorted(statistics.state_dict()["norms"]) == [1.0] + [3.0] * 71


@REPRESENTATIONS
@pytest.mark.parametrize("has_logged", [True, False])
def test_state_of_version_0_1_continues(where: Any, has_logged: bool) -> None:
    state = {"updates": 3, "clipped": 1.0, "norms": [1.0, -1.0, 3.0], "stride": 1, "seen": 3}
    if has_logged:
        state["logged"] = [2, 1.0]
    statistics = ClipStatistics()
    statistics.load_state_dict(state)
    feed(statistics, [5.0], 2.0, where)
    assert (statistics.report().updates, statistics.report().clipped) == (4, 2)
    assert statistics.fraction_since_last_log() == (0.5 if has_logged else 1.0)
    assert statistics.state_dict() == {
        "updates": 4,
        "clipped": 2.0,
        "logged": [4, 2.0],
        "largest": 5.0,
        "last_tensors": [0.0, 0.0, 0.0, 5.0],
        "norms": [1.0, -1.0, 3.0, 5.0],
        "stride": 1,
        "seen": 4,
    }


def test_no_report_without_a_coefficient() -> None:
    statistics = ClipStatistics()
    statistics.add(
        ClipDecision(threshold=1.0)
    )  # a rule that writes the gradients itself has no coefficient
    assert statistics.report() is None


@pytest.mark.parametrize(
    ("clipped", "rule", "expected"),
    [
        (80, NormClip(1.0), r"More than half of the updates are clipped: .* above 7\."),
        (80, ZClip(), "More than half of the updates are clipped"),
        (80, ZClip(max_norm=None), None),
        (80, AutoClip(), None),
        (30, NormClip(1.0), None),
        (0, NormClip(1.0), "No update was clipped: the largest norm was 9.25. .* lower it to 7"),
        (0, ZClip(), None),
    ],
)
def test_advice(clipped: float, rule: ClippingRule, expected: str | None) -> None:
    report = ClipReport(
        updates=100, clipped=clipped, threshold=1.0, median=3.0, p95=7.0, largest=9.25
    )
    found = advice(report, rule)
    assert found is None if expected is None else re.match(expected, found)
    assert advice(replace(report, updates=31), rule) is None
    assert advice(replace(report, repeated=Repetition(norm=7.0, fraction=0.9)), rule) is None


@pytest.mark.parametrize(
    ("p95", "largest", "end"),
    [
        (0.13574, 0.13994, "lower it to 0.135."),
        (1234.5, 2000.0, "lower it to 1.23e+03."),
        (0.0, 0.0, "may stay."),
    ],
)
def test_the_advised_threshold_clips_something(p95: float, largest: float, end: str) -> None:
    report = ClipReport(updates=100, clipped=0, threshold=9e9, median=p95, p95=p95, largest=largest)
    found = advice(report, NormClip(9e9))
    assert found is not None
    assert found.endswith(end)


@pytest.mark.parametrize(
    ("threshold", "ratio"),
    [
        (1e-4, "3.33e-05"),
        (0.1, "0.0333"),
        (1.5, "0.5"),
        (3.0, "1.0"),
        (12.1, "4.0"),
        (900.0, "300"),
    ],
)
def test_ratio_to_the_median_is_never_rounded_to_zero(threshold: float, ratio: str) -> None:
    report = ClipReport(updates=100, clipped=1, threshold=threshold, median=3.0, p95=7.0)
    assert f" is {ratio} × the median norm 3 " in str(report)


def test_report_without_a_threshold_is_printed() -> None:
    report = ClipReport(updates=4, clipped=1, threshold=None, median=3.0, p95=7.0)
    assert str(report) == "25.0 % of 4 updates clipped; median norm 3 (95th percentile 7)"
