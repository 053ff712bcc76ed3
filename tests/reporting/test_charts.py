"""The charts of the report: lines, colors, scales and axis labels."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_bigopt.reporting import charts
from lightning_bigopt.reporting.charts import CHARTS, Chart, draw
from lightning_bigopt.reporting.runs import Run

RATIO = next(chart for chart in CHARTS if chart.title == "Update-to-weight ratio")
TAG = "layers/update_ratio"


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that draws a chart and returns its axes."""
    monkeypatch.setattr(charts, "to_svg", lambda figure: figure)

    def of(chart: Chart, *runs: Run) -> Any:
        figure: Any = draw(chart, runs)
        return figure.axes

    return of


def run_of(curves: dict[str, list[float]], name: str = "a") -> Run:
    return Run(name=name, curves={tag: list(enumerate(ys)) for tag, ys in curves.items()})


def lines_by_label(axis: Any) -> dict[str, Any]:
    handles, labels = axis.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def test_of_many_layers_the_largest_and_smallest_are_labeled(axes: Any) -> None:
    layers = {f"{TAG}/blocks.{i}": [1e-3 * (1 + i)] * 3 for i in range(20)}
    (axis,) = axes(RATIO, run_of(layers))
    shown = [f"{TAG}/blocks.{i}" for i in (19, 18, 17, 2, 1, 0)]
    assert list(lines_by_label(axis)) == ["14 between them", *shown]
    assert len({lines_by_label(axis)[tag].get_color() for tag in shown}) == len(shown)
    assert len(axis.lines) == 20
    assert axis.get_legend() is not None


def test_tag_has_the_same_color_in_both_runs(axes: Any) -> None:
    one, two, three = (f"{TAG}/{name}" for name in ("one", "two", "three"))
    first = run_of({one: [1.0], two: [2.0]})
    second = run_of({three: [1.0], two: [3.0], one: [2.0]}, "b")
    left, right = map(lines_by_label, axes(RATIO, first, second))
    for tag in (one, two):
        assert left[tag].get_color() == right[tag].get_color()
    assert right[three].get_color() not in {left[one].get_color(), left[two].get_color()}


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
    throughput = next(chart for chart in CHARTS if chart.title == "Throughput")
    loss = next(chart for chart in CHARTS if chart.title == "Loss")
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
    assert [axis.get_xlabel() for axis in axes(loss, at_updates, at_amounts)] == ["update"] * 2
