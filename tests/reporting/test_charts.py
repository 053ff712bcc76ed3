"""The charts of the report: what is drawn, in which colors and over what."""

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
    """The axes of a chart, instead of their picture."""
    monkeypatch.setattr(charts, "to_svg", lambda figure: figure)

    def of(chart: Chart, *runs: Run) -> Any:
        figure: Any = draw(chart, runs)
        return figure.axes

    return of


def run_of(curves: dict[str, list[float]], name: str = "a") -> Run:
    return Run(name=name, curves={tag: list(enumerate(ys)) for tag, ys in curves.items()})


def named(axis: Any) -> dict[str, Any]:
    handles, labels = axis.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def test_of_many_layers_the_extremes_are_named(axes: Any) -> None:
    layers = {f"{TAG}/blocks.{i}": [1e-3 * (1 + i)] * 3 for i in range(20)}
    (axis,) = axes(RATIO, run_of(layers))
    shown = [f"{TAG}/blocks.{i}" for i in (19, 18, 17, 2, 1, 0)]
    assert list(named(axis)) == ["14 between them", *shown]
    assert len({named(axis)[tag].get_color() for tag in shown}) == len(shown)
    assert len(axis.lines) == 20
    assert axis.get_legend() is not None


def test_a_tag_has_one_color_in_both_runs(axes: Any) -> None:
    one, two, three = (f"{TAG}/{name}" for name in ("one", "two", "three"))
    first = run_of({one: [1.0], two: [2.0]})
    second = run_of({three: [1.0], two: [3.0], one: [2.0]}, "b")
    left, right = map(named, axes(RATIO, first, second))
    for tag in (one, two):
        assert left[tag].get_color() == right[tag].get_color()
    assert right[three].get_color() not in {left[one].get_color(), left[two].get_color()}


def test_a_zero_does_not_take_the_logarithmic_axis_away(axes: Any) -> None:
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
def test_a_spike_does_not_press_the_loss_to_the_floor(
    losses: list[float], scale: str, axes: Any
) -> None:
    (axis,) = axes(CHARTS[0], run_of({"train_loss": losses}))
    assert axis.get_yscale() == scale


@pytest.mark.parametrize("unit", ["samples", "tokens"])
def test_axes_are_named_with_their_units(unit: str, axes: Any) -> None:
    throughput = next(chart for chart in CHARTS if chart.title == "Throughput")
    loss = next(chart for chart in CHARTS if chart.title == "Loss")
    at_updates = run_of({"throughput/samples_per_second": [1.0], "train_loss": [1.0]})
    curves = {
        f"progress/{unit}": [(40, 40.0), (2**25 + 1, float(2**25))],  # as a float32 has it
        "throughput/samples_per_second": [(40, 1.0)],
        "train_loss": [(0, 1.0)],
    }
    at_amounts = Run(name="b", curves=curves)
    left, right = axes(throughput, at_updates, at_amounts)
    assert [left.get_xlabel(), right.get_xlabel()] == ["update", unit]
    assert left.get_ylabel() == "samples/s"
    # What a module logs stands at Lightning's own step.
    assert [axis.get_xlabel() for axis in axes(loss, at_updates, at_amounts)] == ["update"] * 2
