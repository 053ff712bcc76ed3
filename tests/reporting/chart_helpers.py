"""Runs with made-up curves, and what their charts contain."""

from __future__ import annotations

import re
from typing import Any

from lightning_bigopt.reporting.charts import CHARTS, Chart
from lightning_bigopt.reporting.drawing import draw
from lightning_bigopt.reporting.runs import Run


def chart_of(title: str) -> Chart:
    return next(chart for chart in CHARTS if chart.title == title)


LOSS, LR, RATIO = map(chart_of, ("Loss", "Learning rate", "Update-to-weight ratio"))


def run_of(curves: dict[str, list[float]], name: str = "a") -> Run:
    return Run(name=name, curves={tag: list(enumerate(ys)) for tag, ys in curves.items()})


def lines_by_label(axis: Any) -> dict[str, Any]:
    handles, labels = axis.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def points(line: Any) -> list[tuple[float, float]]:
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def texts_of(chart: Chart, *runs: Run) -> list[str]:
    """Returns the texts in the SVG of a chart, in their order."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", draw(chart, runs) or "")
