"""The picture of a comparison: losses by seed, their differences, and the searches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_bigopt.reporting.picture import (
    plain_text,
    set_number_format,
    short_label,
    write_picture,
)
from lightning_bigopt.reporting.study import Axis
from lightning_bigopt.reporting.study_picture import format_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_bigopt.reporting.compared_side import ComparedSide
    from lightning_bigopt.reporting.comparison import ComparisonRecord

__all__ = ["draw_comparison", "write_comparison_picture"]

_WIDTH, _HEIGHT = 3.7, 3.4  # of one panel, in inches
_A, _B, _MEAN, _GRAY = "#dd6b20", "#3182ce", "#1a202c", "#718096"
_WORST = 6  # times the distance between best and median loss: worse trials are drawn at the edge


def write_comparison_picture(record: ComparisonRecord, path: str | Path) -> Path:
    """Draws a comparison, and writes a file.

    Args:
        record: The comparison.
        path: The file; its suffix selects the format.

    Returns:
        The path.

    Raises:
        ValueError: If the path is a folder or cannot be written.
    """
    return write_picture(lambda: draw_comparison(record), path, example="comparison.png")


def draw_comparison(record: ComparisonRecord) -> Any:
    """Draws up to three panels: losses by seed, their differences, and the searches.

    The differences are drawn if there is a test. The searches are drawn if each side has tuned one
    number.

    Args:
        record: The comparison.

    Returns:
        The ``matplotlib.figure.Figure``.
    """
    from matplotlib.figure import Figure

    painters: list[Callable[[Axes, ComparisonRecord], None]] = [_paint_pairs]
    if record.test is not None:
        painters.append(_paint_differences)
    if all(_has_curve(side) for side in (record.a, record.b)):
        painters.append(_paint_searches)
    with plain_text():
        size = (max(_WIDTH * len(painters), 5.0), _HEIGHT)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(1, len(painters), squeeze=False)[0]
        for panel, paint in zip(panels, painters, strict=True):
            paint(panel, record)
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
    return figure


def _paint_pairs(panel: Axes, record: ComparisonRecord) -> None:
    """Draws a line from the loss of a to that of b for each seed, and their means."""
    for pair in record.pairs:
        panel.plot([0, 1], pair, color=_GRAY, linewidth=0.8, alpha=0.7, zorder=2)
    sides = zip((record.a, record.b), record.means, (_A, _B), strict=True)
    for place, (side, mean, color) in enumerate(sides):
        losses = [loss for loss in side.losses if loss is not None]
        panel.scatter([place] * len(losses), losses, s=26, color=color, zorder=3)
        panel.plot([place - 0.14, place + 0.14], [mean] * 2, color=_MEAN, linewidth=2, zorder=4)
    names = [short_label(side.name, limit=24) for side in (record.a, record.b)]
    panel.set_xticks([0, 1], names, fontsize=9)
    panel.set_xlim(-0.5, 1.5)
    set_number_format(panel, is_log=False)
    panel.set_ylabel(short_label(record.monitor))
    panel.set_title("one line per seed; bars: means", fontsize=9, color=_GRAY)


def _paint_differences(panel: Axes, record: ComparisonRecord) -> None:
    """Draws the difference at each seed, and the mean with its confidence interval."""
    test = record.test
    assert test is not None
    last = len(record.seeds)
    names = [*map(str, record.seeds), "mean"]
    panel.axhline(0, color=_MEAN, linewidth=0.9, zorder=1)
    if test.detectable > 0:
        panel.axhspan(-test.detectable, test.detectable, color=_GRAY, alpha=0.13, linewidth=0)
    for place, (a, b) in enumerate(zip(record.a.losses, record.b.losses, strict=True)):
        if a is None or b is None:
            style: dict[str, Any] = {"rotation": 90, "fontsize": 8, "color": _A}
            panel.text(place, 0, "diverged", ha="center", va="center", zorder=5, **style)
        else:
            panel.scatter([place], [b - a], s=26, color=_GRAY, zorder=3)
    low, high = test.interval
    panel.errorbar(
        [last],
        [test.difference],
        yerr=[[test.difference - low], [high - test.difference]],
        fmt="o",
        color=_MEAN,
        capsize=4,
        zorder=4,
    )
    every = -(-len(names) // 12)  # at most about twelve labels
    shown = [n for n in range(last) if n % every == 0 and last - n >= min(every, 2)]
    panel.set_xticks([*shown, last], [names[n] for n in (*shown, last)])
    panel.set_xlim(-0.6, last + 0.6)
    panel.set_xlabel("seed")
    set_number_format(panel, is_log=False)
    panel.set_ylabel(f"b - a of {short_label(record.monitor)}")
    text = "bar: 95 % interval; gray: too small for these seeds"
    panel.set_title(text, fontsize=9, color=_GRAY)


def _paint_searches(panel: Axes, record: ComparisonRecord) -> None:
    """Draws the loss of each trial against the tuned value of both sides."""
    limits = [_worst(side, record.direction) for side in (record.a, record.b)]
    worst = max(limits) if record.direction == "minimize" else min(limits)
    bound = min if record.direction == "minimize" else max
    for side, color in ((record.a, _A), (record.b, _B)):
        points = _points(side)
        values, losses = [x for x, _ in points], [bound(y, worst) for _, y in points]
        name = short_label(side.name, limit=26)
        panel.plot(values, losses, "o-", color=color, markersize=4, linewidth=1, label=name)
        best = points[losses.index(bound(losses))]
        panel.scatter(
            [best[0]], [best[1]], s=100, facecolors="none", edgecolors=color, linewidths=2
        )
    format_values(panel, _searched(record))
    set_number_format(panel, is_log=False)
    paths = dict.fromkeys(path for side in (record.a, record.b) for path in side.best_values)
    panel.set_xlabel(" / ".join(short_label(path) for path in paths))
    panel.set_ylabel(short_label(record.monitor))
    panel.set_title("the searches; rings: best trials", fontsize=9, color=_GRAY)
    panel.legend(fontsize=8, frameon=False)


def _points(side: ComparedSide) -> list[tuple[float, float]]:
    """Returns the tuned value and the loss of each complete trial, by value."""
    assert side.study is not None
    (axis,) = side.study.axes
    return sorted(
        (float(trial.values[axis.name]), trial.loss)
        for trial in side.study.trials
        if trial.state == "complete" and trial.loss is not None
    )


def _has_curve(side: ComparedSide) -> bool:
    axes = () if side.study is None else side.study.axes
    return len(axes) == 1 and axes[0].low is not None and bool(_points(side))


def _searched(record: ComparisonRecord) -> Axis:
    """Returns an axis that contains the ranges of both sides."""
    axes = [side.study.axes[0] for side in (record.a, record.b) if side.study is not None]
    return Axis(
        name=" / ".join(dict.fromkeys(axis.name for axis in axes)),
        low=min(axis.low for axis in axes if axis.low is not None),
        high=max(axis.high for axis in axes if axis.high is not None),
        is_log=all(axis.is_log for axis in axes),
    )


def _worst(side: ComparedSide, direction: str) -> float:
    """Returns the loss at which far worse trials are drawn."""
    losses = sorted((loss for _, loss in _points(side)), reverse=direction == "maximize")
    reach = losses[0] + _WORST * (losses[len(losses) // 2] - losses[0])
    return min(reach, losses[-1]) if direction == "minimize" else max(reach, losses[-1])
