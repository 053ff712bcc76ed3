"""Draws a chart of one run, or of several runs side by side, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from lightning_bigopt.reporting.charts import Chart
from lightning_bigopt.reporting.lines import (
    COLORS,
    GRAY,
    draw_line,
    draw_marks,
    show_not_logged,
)
from lightning_bigopt.reporting.overlay import describe_overlay, draw_overlay
from lightning_bigopt.reporting.picture import (
    add_legend,
    figure_width,
    new_picture,
    set_number_format,
    short_label,
    short_labels,
    to_svg,
)
from lightning_bigopt.reporting.runs import Curve, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["describe", "draw"]

# With more curves than colors, only the three highest and the three lowest get a color.
_HIGHEST = _LOWEST = 3
_MAX_TITLE = 56  # characters of the name of a run above its axes


def describe(chart: Chart, runs: Sequence[Run]) -> str:
    """Returns the explanation of a chart of some runs."""
    return f"{chart.text} {describe_overlay(runs)}" if _overlays(chart, runs) else chart.text


def draw(chart: Chart, runs: Sequence[Run]) -> str | None:
    """Draws a chart of one run, or of several runs side by side with a common scale.

    Losses of several runs are drawn over each other instead.

    Args:
        chart: The specification of the chart.
        runs: The runs, from left to right.

    Returns:
        The chart as an SVG element; None if no run has a curve for it.
    """
    solid = [chart.curves(run) for run in runs]
    if not any(solid):
        return None
    if _overlays(chart, runs):
        return draw_overlay(chart, runs)
    dashed = [chart.planned_curves(run) for run in runs]
    colors = _choose_colors(chart, runs)
    is_log = chart.is_logarithmic(y for own in solid for curve in own.values() for _, y in curve)
    width = figure_width(len(runs)) / len(runs)
    # Wide under a plan, whose dashes would otherwise hide equal values.
    line_width = 1.8 if any(dashed) else 1.2

    def paint(axes: Sequence[Axes]) -> int:
        with_data, rows = [], [0]
        for axis, run, lines, plan, own in zip(axes, runs, solid, dashed, colors, strict=True):
            if len(runs) > 1:
                axis.set_title(short_label(run.name, limit=_MAX_TITLE), fontsize=10)
            if not lines and not plan:
                show_not_logged(axis)
                continue
            with_data.append(axis)
            if is_log:
                axis.set_yscale("log")
            prefixes = chart.prefixes_for(run)
            _draw_lines(axis, lines, own, prefixes=prefixes, width=line_width, is_log=is_log)
            _draw_plan(axis, plan, label=chart.planned_label, is_log=is_log)
            axis.grid(alpha=0.25)
            # Modules log losses per update, even if the x axis of the monitor has another unit.
            axis.set_xlabel("update" if chart.is_logged_by_module else run.axis)
            rows.append(add_legend(axis, width=width))
        with_data[0].set_ylabel(chart.unit)
        with_data[0].tick_params(labelleft=True)  # hidden unless these are the first axes
        if chart.limits is not None:
            with_data[0].set_ylim(*chart.limits)
        set_number_format(with_data[0], is_log=is_log)
        return max(rows)

    has_one_unit = len({run.axis for run in runs}) == 1
    return to_svg(new_picture(paint, columns=len(runs), shares_x=has_one_unit))


def _overlays(chart: Chart, runs: Sequence[Run]) -> bool:
    return chart.is_logged_by_module and len(runs) > 1


def _choose_colors(chart: Chart, runs: Sequence[Run]) -> list[dict[str, str]]:
    """Returns the colors of each run by tag; a tag has the same color in runs with equal prefixes.

    If there are more tags than colors, only the three with the highest and the three with the
    lowest median get a color.
    """
    colors: dict[tuple[str, ...], dict[str, str]] = {}
    for prefixes in {chart.prefixes_for(run): None for run in runs}:
        alike = [chart.curves(run) for run in runs if chart.prefixes_for(run) == prefixes]
        tags = list(dict.fromkeys(tag for curves in alike for tag in curves))
        if len(tags) > len(COLORS):
            tags.sort(key=lambda tag: -_median([curves.get(tag, []) for curves in alike]))
            tags = [*tags[:_HIGHEST], *tags[-_LOWEST:]]
        colors[prefixes] = dict(zip(tags, COLORS, strict=False))
    return [colors[chart.prefixes_for(run)] for run in runs]


def _median(curves: Sequence[Curve]) -> float:
    return median([v for curve in curves for _, v in curve if math.isfinite(v)] or [0.0])


def _draw_lines(
    axis: Axes,
    curves: Mapping[str, Curve],
    colors: Mapping[str, str],
    *,
    prefixes: Sequence[str],
    width: float,
    is_log: bool,
) -> None:
    others = [tag for tag in curves if tag not in colors]
    for tag in others:
        label = f"{len(others)} between them" if tag == others[0] else None
        draw_line(axis, curves[tag], label=label, color=GRAY, is_log=is_log, alpha=0.5)
    named = {tag: curves[tag] for tag in colors if tag in curves}
    labels = short_labels(named, prefixes)
    for tag, curve in named.items():
        draw_line(axis, curve, label=labels[tag], color=colors[tag], is_log=is_log, width=width)
    draw_marks(axis, named, colors, is_log=is_log)


def _draw_plan(axis: Axes, curves: Mapping[str, Curve], *, label: str, is_log: bool) -> None:
    for number, curve in enumerate(curves.values()):
        draw_line(
            axis,
            curve,
            label=None if number else label,
            color="black",  # visible on the line of the values that it plans
            is_log=is_log,
            style="--",
            width=1.0,
            alpha=0.6,
        )
