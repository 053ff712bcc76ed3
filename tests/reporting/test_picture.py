"""Legends, names and numbers in the charts of a report."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_bigopt.reporting.charts import Chart
from lightning_bigopt.reporting.lines import COLORS
from tests.reporting.chart_helpers import LR, RATIO, chart_of, run_of, texts_of

LAYER = "layers/update_ratio"

# ----------------------------------------------------------------------------------------- legends


@pytest.mark.parametrize("count", [6, 7, 50])
def test_legend_has_at_most_eight_entries(count: int, axes: Any) -> None:
    used = {f"optim/lr/group{i}": [1.0 + i] * 2 for i in range(count)}
    planned = {f"plan/lr/group{i}": [1.0 + i] * 2 for i in range(count)}
    (axis,) = axes(LR, run_of(used | planned))
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert len(labels) == min(count, 7) + 1
    assert labels[-1] == "planned"
    named = [line for line in axis.lines if line.get_color() in COLORS]
    assert len({line.get_color() for line in named}) == len(named) == 6


@pytest.mark.parametrize("runs", [1, 2])
def test_legend_is_below_the_axes(runs: int, axes: Any) -> None:
    layers = {f"{LAYER}/blocks.{i}.attention": [1.0, 2.0] for i in range(6)}
    for axis in axes(RATIO, *[run_of(layers, str(number)) for number in range(runs)]):
        legend, label = axis.get_legend(), axis.xaxis.label
        assert legend.get_window_extent().y0 >= 0
        assert legend.get_window_extent().y1 <= label.get_window_extent().y0 + 1


def test_legends_of_two_runs_do_not_overlap(axes: Any) -> None:
    layers = {f"{LAYER}/{'a' * 20}{i}{'b' * 20}": [1.0, 2.0] for i in range(6)}
    left, right = axes(RATIO, run_of(layers), run_of(layers, "b"))
    boxes = [axis.get_legend().get_window_extent() for axis in (left, right)]
    assert boxes[0].x1 < boxes[1].x0
    assert boxes[0].x0 >= 0
    assert boxes[1].x1 <= left.figure.bbox.x1


def test_marks_are_named_once(axes: Any) -> None:
    bad = {f"{LAYER}/{i}": [1.0, 0.0, float("nan")] for i in range(6)}
    _, labels = axes(RATIO, run_of(bad))[0].get_legend_handles_labels()
    assert labels == [*"012345", "not finite", "zero"]


# ------------------------------------------------------------------------------------------- names

LONG = "model.transformer.layers.11.attention.output"


@pytest.mark.parametrize(
    ("chart", "tag", "label"),
    [
        (RATIO, f"{LAYER}/head", "head"),
        (RATIO, f"{LAYER}/_orig_mod", f"{LAYER}/_orig_mod"),  # not left out of the legend
        (RATIO, f"{LAYER}/{LONG}", "model.transform…ttention.output"),
        (RATIO, f"{LAYER}/$x$", "$x$"),
        (LR, "optim/lr", "optim/lr"),
        (LR, "optim/lr/decay", "decay"),
        (chart_of("Seconds per step"), "time/step_p95", "step_p95"),
        (chart_of("GPU memory"), "memory/reserved_peak", "reserved_peak"),
        (chart_of("Rejected updates"), "guard/rejected/NormSpike", "NormSpike"),
        (chart_of("Global batch"), "batch/global_size", "batch/global_size"),
    ],
)
def test_names_in_the_legend_are_short(chart: Chart, tag: str, label: str) -> None:
    assert texts_of(chart, run_of({tag: [1.0, 2.0]})).count(label) == 1


def test_short_names_stay_different() -> None:
    tags = [f"{LAYER}/{'a' * 20}.{i}.{'b' * 20}" for i in range(3)]
    names = [
        text for text in texts_of(RATIO, run_of({tag: [1.0] for tag in tags})) if "aaa" in text
    ]
    assert len(set(names)) == len(names) == 3


# ------------------------------------------------------------------------------------------- ticks


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1e-3, 1.0], ["0.001", "0.01", "0.1", "1"]),
        ([1e-7, 1e-5], ["1e-7", "1e-6", "1e-5"]),
        ([3e-3, 6e-3], ["0.005"]),
        ([1e5, 1e8], ["100000", "1e6", "1e7", "1e8"]),
    ],
)
def test_logarithmic_ticks_are_plain_numbers(values: list[float], expected: list[str]) -> None:
    texts = texts_of(RATIO, run_of({f"{LAYER}/a": values}))
    assert set(expected) <= set(texts)
    # Powers of ten would be two texts, of which the second is an exponent.
    assert "10" not in texts


@pytest.mark.parametrize(
    "values", [[1e-3, 1.1e-3], [0.02, 0.04], [1e-4, 9e-4], [1e-8, 1.0], [0.5, 0.5]]
)
def test_logarithmic_axis_has_at_least_two_different_ticks(values: list[float], axes: Any) -> None:
    (axis,) = axes(RATIO, run_of({f"{LAYER}/a": values}))
    low, high = axis.get_ylim()
    ticks = [t for t in axis.yaxis.get_major_ticks() if low <= t.get_loc() <= high]
    labels = [tick.label1.get_text() for tick in ticks]
    assert len(set(labels)) == len(labels) >= 2


def test_small_learning_rates_have_no_common_factor() -> None:
    texts = texts_of(LR, run_of({"optim/lr": [0.0, 1e-5, 2e-5]}))
    assert "2e-5" in texts
    assert not any("1e" in text and "\u2212" in text for text in texts)
