"""The picture of a study: the loss against each searched value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_bigopt.reporting.picture import (
    drawn_label,
    format_number,
    plain_text,
    set_number_format,
    short_label,
    write_picture,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_bigopt.reporting.study import Axis, StudyRecord, StudyTrial

__all__ = ["draw_basin", "draw_importance", "format_values", "write_study_picture"]

_COLUMNS, _WIDTH, _HEIGHT = 3, 3.4, 2.9  # of one panel, in inches
_COMPLETE, _PRUNED, _BEST = "#3182ce", "#718096", "#dd6b20"
_WORST = 20  # times the distance between best and median loss: worse ones are drawn at the top


def write_study_picture(study: StudyRecord, path: str | Path) -> Path:
    """Draws the loss against each value, and writes a file.

    Args:
        study: The study.
        path: The file; its suffix selects the format.

    Raises:
        ValueError: If the path is a folder or cannot be written.
    """
    return write_picture(lambda: draw_basin(study), path, example="study.png")


def draw_basin(study: StudyRecord) -> Any:
    """Draws one panel for each searched value, with a common vertical axis.

    Complete trials are dots and pruned ones crosses, at their last value. A pruned trial without a
    value, and one that is far worse than the others, is drawn at the upper edge of the panel, or at
    the lower one if the study maximizes.

    Args:
        study: The study.

    Returns:
        The ``matplotlib.figure.Figure``.
    """
    from matplotlib.figure import Figure

    columns = 2 if len(study.axes) == 4 else min(len(study.axes), _COLUMNS)
    rows = math.ceil(len(study.axes) / columns)
    limits = _limits(study)
    with plain_text():
        size = (max(_WIDTH * columns, 5.0), _HEIGHT * rows + 0.4)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
        for panel, axis in zip(panels, study.axes, strict=False):
            _paint(panel, axis, study, limits)
        for panel in panels[len(study.axes) :]:
            panel.set_visible(False)
        for panel in panels[::columns]:
            panel.set_ylabel(short_label(study.monitor))
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            ncols=len(labels),
            loc="outside lower center",
            frameon=False,
            fontsize=9,
        )
    return figure


def draw_importance(study: StudyRecord) -> Any:
    """Draws the share of each value in the variance of the loss as bars.

    Args:
        study: A study whose ``importance`` is known.

    Returns:
        The ``matplotlib.figure.Figure``.
    """
    from matplotlib.figure import Figure

    shares = sorted((study.importance or {}).items(), key=lambda item: item[1])
    with plain_text():
        figure = Figure(figsize=(6.5, 0.7 + 0.32 * len(shares)), layout="constrained")
        panel = figure.subplots()
        names = [short_label(name) for name, _ in shares]
        bars = panel.barh(names, [share for _, share in shares], color=_COMPLETE, height=0.6)
        panel.bar_label(bars, [f" {100 * share:.0f} %" for _, share in shares], fontsize=9)
        panel.set_xlim(0, 1.1 * max((share for _, share in shares), default=1.0))
        panel.set_xticks([])
        panel.spines[["top", "right", "bottom"]].set_visible(False)
    return figure


def _limits(study: StudyRecord) -> tuple[float, float]:
    """Returns the losses between which trials are drawn at their loss."""
    values = [t.loss for t in study.trials if t.loss is not None and math.isfinite(t.loss)]
    complete = [t.loss for t in study.trials if t.state == "complete" and t.loss is not None]
    if not values:
        return 0.0, 1.0
    if not complete:
        return min(values), max(values)
    complete.sort(reverse=study.direction == "maximize")
    best, middle = complete[0], complete[len(complete) // 2]
    reach = best + _WORST * (middle - best)
    low, high = sorted((best, reach))
    return max(low, min(values)), min(high, max(values))


def _paint(panel: Axes, axis: Axis, study: StudyRecord, limits: tuple[float, float]) -> None:
    low, high = limits
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    is_log = low > 0 and high > 20 * low
    worst = high if study.direction == "minimize" else low
    kinds: Sequence[tuple[str, list[StudyTrial], dict[str, Any]]] = (
        ("complete", [t for t in study.trials if t.state == "complete"], {"color": _COMPLETE}),
        (
            "pruned",
            [t for t in study.trials if t.state == "pruned"],
            {"color": _PRUNED, "marker": "x"},
        ),
        (
            "best",
            [study.best] if study.best is not None else [],
            {"edgecolors": _BEST, "facecolors": "none", "linewidths": 2, "s": 90},
        ),
    )
    for name, trials, style in kinds:
        if trials:
            xs = [_place(axis, trial.values[axis.name]) for trial in trials]
            ys = [_between(trial.loss, low, high, worst) for trial in trials]
            panel.scatter(xs, ys, label=name, **{"s": 26, "zorder": 3, **style})
    if is_log:
        panel.set_yscale("log")
        panel.set_ylim(low * 0.9, high * 1.15)
    else:
        panel.set_ylim(low - margin, high + margin)
    set_number_format(panel, is_log=is_log)
    panel.set_xlabel(short_label(axis.name))
    panel.grid(alpha=0.3)
    format_values(panel, axis)


def format_values(panel: Axes, axis: Axis) -> None:
    """Sets limits, scale and ticks of the horizontal axis for a searched value.

    Args:
        panel: The axes.
        axis: The searched value.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if axis.low is None or axis.high is None:
        labels = [short_label(option, limit=14) for option in axis.options]
        panel.set_xticks(range(len(labels)), map(drawn_label, labels))
        panel.set_xlim(-0.5, len(labels) - 0.5)
        return
    if axis.is_log:
        panel.set_xscale("log")
        pad = (axis.high / axis.low) ** 0.04
        panel.set_xlim(axis.low / pad, axis.high * pad)
        subs = (1.0,) if axis.high > 100 * axis.low else (1.0, 3.0)
        panel.xaxis.set_major_locator(LogLocator(subs=subs))
        panel.xaxis.set_minor_formatter(NullFormatter())
    else:
        pad = 0.04 * (axis.high - axis.low)
        panel.set_xlim(axis.low - pad, axis.high + pad)
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=isinstance(axis.low, int)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))


def _place(axis: Axis, value: Any) -> float:
    return float(value) if axis.low is not None else float(axis.options.index(str(value)))


def _between(loss: float | None, low: float, high: float, worst: float) -> float:
    if loss is None or not math.isfinite(loss):
        return worst
    return min(max(loss, low), high)
