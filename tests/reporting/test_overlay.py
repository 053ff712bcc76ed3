"""The losses of several runs in the same axes, over updates and over samples."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_bigopt.reporting.drawing import describe
from lightning_bigopt.reporting.runs import Run
from tests.reporting.chart_helpers import LOSS, lines_by_label, points, run_of

SMALL = Run(
    name="small",
    curves={
        "train_loss": [(0, 3.0), (2, 2.0), (4, 1.0)],
        "progress/samples": [(0, 8.0), (2, 24.0), (4, 56.0)],  # the batch grows from 8 to 16
    },
)
LARGE = Run(
    name="large",
    curves={
        "train_loss": [(0, 3.0), (1, 2.5)],
        "val_loss": [(1, 2.75), (3, 2.25)],
        "progress/samples": [(0, 100.0), (1, 200.0)],
    },
)


def test_losses_of_two_runs_are_in_the_same_axes(axes: Any) -> None:
    updates, samples = axes(LOSS, SMALL, LARGE)
    assert [axis.get_xlabel() for axis in (updates, samples)] == ["update", "samples"]
    assert updates.get_ylabel() == "loss"
    names = ["small: train_loss", "large: train_loss", "large: val_loss"]
    assert list(lines_by_label(updates)) == names
    assert [points(lines_by_label(updates)[name]) for name in names] == [
        [(0, 3.0), (2, 2.0), (4, 1.0)],
        [(0, 3.0), (1, 2.5)],
        [(1, 2.75), (3, 2.25)],
    ]
    assert [points(lines_by_label(samples)[name]) for name in names] == [
        [(8, 3.0), (24, 2.0), (56, 1.0)],
        [(100, 3.0), (200, 2.5)],
        [(200, 2.75), (400, 2.25)],  # after the last logged count, at 100 samples per update
    ]
    assert updates.get_xlim()[1] < 5
    assert samples.get_xlim()[1] > 400


def test_color_is_the_run_and_style_the_tag(axes: Any) -> None:
    small, large, validation = lines_by_label(axes(LOSS, SMALL, LARGE)[0]).values()
    assert small.get_color() != large.get_color() == validation.get_color()
    assert small.get_linestyle() == large.get_linestyle() != validation.get_linestyle()


def test_loss_between_two_counts_is_between_their_samples(axes: Any) -> None:
    curves = {"loss": [(0, 1.0), (1, 1.0), (3, 1.0)], "progress/samples": [(1, 20.0), (4, 50.0)]}
    drawn = axes(LOSS, Run(name="a", curves=curves), SMALL)[1].lines[0]
    assert points(drawn) == [(10, 1.0), (20, 1.0), (40, 1.0)]


@pytest.mark.parametrize(
    "counts",
    [
        {},
        {"progress/samples": [(8, 8.0), (16, 16.0)]},  # x_axis="samples"
        {
            "progress/samples": [(80, 8.0), (160, 16.0)],  # x_axis="tokens"
            "progress/tokens": [(80, 80.0), (160, 160.0)],
        },
    ],
)
def test_losses_are_only_over_updates_if_the_samples_are_unknown(counts: Any, axes: Any) -> None:
    unknown = Run(name="unknown", curves={"train_loss": [(0, 1.0)], **counts})
    (axis,) = axes(LOSS, SMALL, unknown)
    assert axis.get_xlabel() == "update"
    assert len(axis.lines) == 2
    text = describe(LOSS, [SMALL, unknown])
    assert "Not over samples: progress/samples is not logged over updates in unknown." in text


def test_text_says_over_what_the_losses_are_shown() -> None:
    assert "over updates, and over samples" in describe(LOSS, [SMALL, LARGE])
    assert "over updates" not in describe(LOSS, [SMALL])


def test_of_many_losses_four_have_a_style_of_their_own(axes: Any) -> None:
    many = run_of({f"loss_{i}": [1.0 + i] * 3 for i in range(7)})
    (axis,) = axes(LOSS, many, run_of({"loss_5": [1.0] * 3}, "b"))
    labels = ["a: 3 more", "a: loss_5", "a: loss_0", "a: loss_1", "a: loss_2", "b: loss_5"]
    assert list(lines_by_label(axis)) == labels
    assert len({line.get_linestyle() for line in list(lines_by_label(axis).values())[1:5]}) == 4


def test_loss_that_is_not_finite_is_marked(axes: Any) -> None:
    bad = run_of({"loss": [1.0, float("nan"), 1.0]}, "bad")
    (axis,) = axes(LOSS, run_of({"loss": [1.0] * 3}), bad)
    assert list(lines_by_label(axis)) == ["a", "bad", "not finite"]
    assert list(lines_by_label(axis)["not finite"].get_xdata()) == [1]


def test_common_legend_is_below_both_axes(axes: Any) -> None:
    both = axes(LOSS, SMALL, LARGE)
    (legend,) = both[0].figure.legends
    bottom = min(axis.xaxis.label.get_window_extent().y0 for axis in both)
    assert 0 <= legend.get_window_extent().y1 <= bottom + 1
