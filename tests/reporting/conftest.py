"""The fixture ``axes``, for the data in the charts of a report."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_bigopt.reporting import drawing, overlay
from lightning_bigopt.reporting.charts import Chart
from lightning_bigopt.reporting.runs import Run


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that draws a chart and returns its axes, with the layout computed."""
    for module in (drawing, overlay):
        monkeypatch.setattr(module, "to_svg", lambda figure: figure)

    def of(chart: Chart, *runs: Run) -> Any:
        figure: Any = drawing.draw(chart, runs)
        figure.draw_without_rendering()
        return figure.axes

    return of
