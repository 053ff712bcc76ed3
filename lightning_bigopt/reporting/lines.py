"""Draws the lines of a chart on matplotlib axes, with marks for values that an axis cannot show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLORS", "GRAY", "Points", "draw_line", "draw_marks", "show_not_logged"]

COLORS = ("#2b6cb0", "#dd6b20", "#2f855a", "#805ad5", "#b83280", "#4a5568")
GRAY, _RED = "#a0aec0", "#c53030"

Points = Sequence[tuple[float, float]]


def draw_line(
    axis: Axes,
    points: Points,
    *,
    label: str | None,
    color: str,
    is_log: bool,
    style: str = "-",
    width: float = 1.2,
    alpha: float = 1.0,
) -> None:
    """Draws the finite points as a line; on a logarithmic axis it has gaps at zeros."""
    shown = [(x, y if y > 0 or not is_log else math.nan) for x, y in points if math.isfinite(y)]
    axis.plot(
        [x for x, _ in shown],
        [y for _, y in shown],
        color=color,
        linestyle=style,
        linewidth=width,
        label=label,
        marker="o" if len(shown) == 1 else None,
        alpha=alpha,
    )


def draw_marks(
    axis: Axes, curves: Mapping[str, Points], colors: Mapping[str, str], *, is_log: bool
) -> None:
    """Marks values that are not finite, and zeros on a logarithmic axis, at its lower edge.

    Args:
        axis: The axes.
        curves: The curves by name.
        colors: The color of each curve, for its zeros.
        is_log: Whether the vertical axis is logarithmic.
    """
    for name, points in curves.items():
        _mark_at_edge(axis, [x for x, y in points if not math.isfinite(y)], "x", "not finite", _RED)
        if is_log:
            _mark_at_edge(axis, [x for x, y in points if y == 0], "v", "zero", colors[name])


def _mark_at_edge(axis: Axes, xs: Sequence[float], sign: str, label: str, color: str) -> None:
    if xs:
        is_named = label in axis.get_legend_handles_labels()[1]
        axis.plot(
            xs,
            [0.02] * len(xs),
            sign,
            color=color,
            label=None if is_named else label,
            transform=axis.get_xaxis_transform(),
            markersize=4,
        )


def show_not_logged(axis: Axes) -> None:
    """Shows the text "not logged" instead of empty axes."""
    axis.set_axis_off()
    axis.text(
        0.5, 0.5, "not logged", transform=axis.transAxes, ha="center", va="center", color="#4a5568"
    )
