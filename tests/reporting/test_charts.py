"""The charts of the report: lines, colors, scales and axis labels."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_bigopt.reporting.charts import CHARTS
from lightning_bigopt.reporting.runs import Run
from tests.reporting.chart_helpers import (
    LOSS,
    LR,
    RATIO,
    chart_of,
    lines_by_label,
    run_of,
    texts_of,
)

TAG = "layers/update_ratio"


def test_of_many_layers_the_largest_and_smallest_are_labeled(axes: Any) -> None:
    layers = {f"{TAG}/blocks.{i}": [1e-3 * (1 + i)] * 3 for i in range(20)}
    (axis,) = axes(RATIO, run_of(layers))
    shown = [f"blocks.{i}" for i in (19, 18, 17, 2, 1, 0)]
    assert list(lines_by_label(axis)) == ["14 between them", *shown]
    assert len({lines_by_label(axis)[name].get_color() for name in shown}) == len(shown)
    assert len(axis.lines) == 20
    assert axis.get_legend() is not None


def test_tag_has_the_same_color_in_both_runs(axes: Any) -> None:
    first = run_of({f"{TAG}/one": [1.0], f"{TAG}/two": [2.0]})
    second = run_of({f"{TAG}/three": [1.0], f"{TAG}/two": [3.0], f"{TAG}/one": [2.0]}, "b")
    left, right = map(lines_by_label, axes(RATIO, first, second))
    for name in ("one", "two"):
        assert left[name].get_color() == right[name].get_color()
    assert right["three"].get_color() not in {left["one"].get_color(), left["two"].get_color()}


def test_zeros_keep_the_logarithmic_axis_and_are_marked(axes: Any) -> None:
    (axis,) = axes(RATIO, run_of({f"{TAG}/a": [1e-3, 0.0, 1e-1], f"{TAG}/dead": [0.0] * 3}))
    assert axis.get_yscale() == "log"
    marks = [list(line.get_xdata()) for line in axis.lines if line.get_marker() == "v"]
    assert marks == [[1], [0, 1, 2]]


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        ([3.0, 2.0, 1.0], "linear"),
        ([3.0, 2.0, 800.0, 1.0], "log"),
        ([3.0, 2.0, 800.0, -1.0], "linear"),
        ([float("nan")], "linear"),
    ],
)
def test_loss_with_a_spike_has_a_logarithmic_axis(
    losses: list[float], scale: str, axes: Any
) -> None:
    (axis,) = axes(CHARTS[0], run_of({"train_loss": losses}))
    assert axis.get_yscale() == scale


@pytest.mark.parametrize("unit", ["samples", "tokens"])
def test_axes_have_labels_with_units(unit: str, axes: Any) -> None:
    throughput = chart_of("Throughput")
    at_updates = run_of({"throughput/samples_per_second": [1.0], "train_loss": [1.0]})
    curves = {
        f"progress/{unit}": [(40, 40.0), (2**25 + 1, float(2**25))],  # rounded to float32
        "throughput/samples_per_second": [(40, 1.0)],
        "train_loss": [(0, 1.0)],
    }
    at_amounts = Run(name="b", curves=curves)
    left, right = axes(throughput, at_updates, at_amounts)
    assert [left.get_xlabel(), right.get_xlabel()] == ["update", unit]
    assert left.get_ylabel() == "samples/s"
    # Values that a module logs are on Lightning's own step axis.
    (axis,) = axes(LOSS, at_amounts)
    assert axis.get_xlabel() == "update"


def test_axes_with_other_units_have_scales_of_their_own(axes: Any) -> None:
    short = run_of({"grad_norm/total": [1.0] * 3})
    curves = {"grad_norm/total": [(64, 1.0), (128, 1.0)], "progress/samples": [(64, 64.0)]}
    chart = chart_of("Gradient norm")
    left, right = axes(chart, short, Run(name="b", curves=curves))
    assert left.get_xlim()[1] < 3
    assert right.get_xlim()[1] > 128
    left, right = axes(chart, short, run_of({"grad_norm/total": [1.0] * 9}, "b"))
    assert left.get_xlim() == right.get_xlim()


def test_ratio_chart_shows_quantiles_and_for_an_older_log_layers(axes: Any) -> None:
    layers = {f"{TAG}/block.{i}": [1e-3] * 2 for i in range(9)}
    quantiles = {f"update_ratio/{name}": [1e-3] * 2 for name in ("min", "median", "max")}
    new, old = axes(RATIO, run_of({**layers, **quantiles}, "new"), run_of(layers, "old"))
    assert list(lines_by_label(new)) == ["min", "median", "max"]
    assert len({line.get_color() for line in new.lines}) == 3
    assert "3 between them" in lines_by_label(old)


@pytest.mark.parametrize("order", [1, -1])
def test_run_without_data_shows_not_logged(order: int, axes: Any) -> None:
    clipped, plain = run_of({"clip/fraction": [0.0, 1.0]}, "clipped"), run_of({"x": [1.0]}, "plain")
    runs = [clipped, plain][::order]
    with_data, empty = axes(chart_of("Clipping"), *runs)[::order]
    assert not empty.axison
    assert [text.get_text() for text in empty.texts] == ["not logged"]
    assert empty.get_title() == "plain"
    assert with_data.axison
    assert with_data.get_ylabel() == "fraction of the updates"
    assert all(tick.label1.get_visible() for tick in with_data.yaxis.get_major_ticks())


def test_not_logged_is_text_in_the_picture() -> None:
    clipped, plain = run_of({"clip/fraction": [0.0, 1.0]}, "clipped"), run_of({"x": [1.0]}, "plain")
    texts = texts_of(chart_of("Clipping"), clipped, plain)
    assert texts.count("not logged") == 1
    assert texts_of(chart_of("Clipping"), clipped, clipped).count("not logged") == 0


def test_clipped_fraction_has_an_axis_from_0_to_1(axes: Any) -> None:
    (axis,) = axes(chart_of("Clipping"), run_of({"clip/fraction": [0.0, 0.0]}))
    low, high = axis.get_ylim()
    assert -0.1 < low <= 0
    assert 1 <= high < 1.1


def test_plan_alone_is_drawn(axes: Any) -> None:
    planned = run_of({"plan/lr": [1.0, 0.5]}, "planned")
    _, right = axes(LR, run_of({"optim/lr": [1.0]}), planned)
    assert right.axison
    assert list(lines_by_label(right)) == ["planned"]
