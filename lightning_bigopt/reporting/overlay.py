"""Draws the losses of several runs over each other: over updates, and over samples."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_bigopt.reporting.charts import Chart
from lightning_bigopt.reporting.lines import COLORS, Points, draw_line, draw_marks
from lightning_bigopt.reporting.picture import (
    add_legend,
    new_picture,
    set_number_format,
    short_label,
    to_svg,
)
from lightning_bigopt.reporting.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["describe_overlay", "draw_overlay"]

_STYLES = ("-", "--", ":", "-.")


def draw_overlay(chart: Chart, runs: Sequence[Run]) -> str:
    """Draws the curves of all runs in the same axes: over updates, and over samples if known.

    Each run has a color, and each tag a line style.

    Args:
        chart: The specification of the chart, whose values are logged per update.
        runs: The runs.

    Returns:
        The chart as an SVG element.
    """
    curves = [chart.curves(run) for run in runs]
    is_log = chart.is_logarithmic(y for own in curves for points in own.values() for _, y in points)
    panels: list[tuple[str, list[dict[str, Points]]]] = [("update", [dict(own) for own in curves])]
    if all(_counts_samples(run) for run in runs):
        over_samples = [_over_samples(run, own) for run, own in zip(runs, curves, strict=True)]
        panels.append(("samples", over_samples))
    styles = _choose_styles(curves)

    def paint(axes: Sequence[Axes]) -> int:
        for axis, (unit, drawn) in zip(axes, panels, strict=True):
            if is_log:
                axis.set_yscale("log")
            for number, (run, own) in enumerate(zip(runs, drawn, strict=True)):
                _draw_run(axis, run, own, styles, color=COLORS[number % len(COLORS)], is_log=is_log)
            axis.grid(alpha=0.25)
            axis.set_xlabel(unit)
        axes[0].set_ylabel(chart.unit)
        set_number_format(axes[0], is_log=is_log)
        return add_legend(axes[0], columns=len(runs))

    return to_svg(new_picture(paint, columns=len(panels), shares_x=False))


def describe_overlay(runs: Sequence[Run]) -> str:
    """Describes the axes of :func:`draw_overlay` for the text above the chart.

    Example:
        >>> run = Run(name="a", curves={"loss": [(0, 2.0), (1, 1.0)]})
        >>> describe_overlay([run, run]).split(": ")[0]
        'All runs over updates. Not over samples'
    """
    unknown = [run.name for run in runs if not _counts_samples(run)]
    if not unknown:
        return "All runs over updates, and over samples."
    return (
        "All runs over updates. Not over samples: progress/samples is not logged over updates in "
        f"{', '.join(unknown)}."
    )


def _counts_samples(run: Run) -> bool:
    """Returns whether the samples at each update are known."""
    # With another x axis of the monitor, the updates of its values are not logged.
    return run.axis == "update" and bool(run.curves.get("progress/samples"))


def _over_samples(run: Run, curves: Mapping[str, Points]) -> dict[str, Points]:
    """Returns curves over the samples that were consumed, including those of the update."""
    counted = [(-1.0, 0.0), *run.curves["progress/samples"]]
    updates = [update for update, _ in counted]

    def samples_at(update: float) -> float:
        # Linear between two logged updates, and beyond the last one with the last slope.
        at = min(max(bisect_right(updates, update), 1), len(counted) - 1)
        (before, start), (after, end) = counted[at - 1 : at + 1]
        return start + (end - start) * (update - before) / (after - before)

    return {tag: [(samples_at(x), y) for x, y in points] for tag, points in curves.items()}


def _choose_styles(curves: Sequence[Mapping[str, Points]]) -> dict[str, str]:
    """Returns the line style of each tag; of many tags, those of the most runs have one."""
    tags = list(dict.fromkeys(tag for own in curves for tag in own))
    tags.sort(key=lambda tag: -sum(tag in own for own in curves))  # keeps the order of equals
    return dict(zip(tags, _STYLES, strict=False))


def _draw_run(
    axis: Axes,
    run: Run,
    curves: Mapping[str, Points],
    styles: Mapping[str, str],
    *,
    color: str,
    is_log: bool,
) -> None:
    name = short_label(run.name)
    others = [tag for tag in curves if tag not in styles]
    for tag in others:
        label = f"{name}: {len(others)} more" if tag == others[0] else None
        draw_line(axis, curves[tag], label=label, color=color, is_log=is_log, alpha=0.25)
    named = {tag: curves[tag] for tag in styles if tag in curves}
    for tag, points in named.items():
        draw_line(
            axis,
            points,
            label=name if len(styles) == 1 else f"{name}: {short_label(tag)}",
            color=color,
            is_log=is_log,
            style=styles[tag],
        )
    draw_marks(axis, named, dict.fromkeys(named, color), is_log=is_log)
