"""The charts of a report, drawn as SVG by matplotlib without a display."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from lightning_bigopt.reporting.runs import Curve, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["CHARTS", "Chart", "draw", "new_picture", "to_svg"]

_COLORS = ("#2b6cb0", "#dd6b20", "#2f855a", "#805ad5", "#b83280", "#4a5568")
_GRAY, _RED = "#a0aec0", "#c53030"
# With more curves than this, only the three highest and the three lowest get a color.
_MAX_COLORED_CURVES = 8
# A maximum above this multiple of the median is a spike.
_SPIKE_RATIO = 20
# Stands for all tags that contain the word loss; no other chart matches inside a tag.
_LOSSES = ("*loss*",)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """The specification of one chart of a report.

    Args:
        title: Heading of the chart.
        text: Explanation shown below the heading.
        unit: Label of the vertical axis.
        tags: Prefixes of the tags that are drawn as solid lines.
        planned: Prefixes of the tags that are drawn dashed: plans and limits.
        scale: ``"log"`` for a logarithmic axis, with zeros marked at its lower edge;
            ``"log where it spikes"`` for a logarithmic axis only if the largest value is more than
            20 times the median.
    """

    title: str
    text: str
    unit: str
    tags: tuple[str, ...]
    planned: tuple[str, ...] = ()
    scale: Literal["linear", "log", "log where it spikes"] = "linear"


CHARTS: tuple[Chart, ...] = (
    Chart(
        title="Loss",
        text="All logged values whose name contains the word loss.",
        unit="loss",
        tags=_LOSSES,
        scale="log where it spikes",
    ),
    Chart(
        title="Learning rate",
        text="Dashed: planned before the first update. Solid: used.",
        unit="learning rate",
        tags=("optim/lr",),
        planned=("plan/lr",),
    ),
    Chart(
        title="Gradient norm",
        text="Before clipping. Dashed: the norm above which clipping acts.",
        unit="norm",
        tags=("grad_norm/total",),
        planned=("clip/threshold",),
        scale="log",
    ),
    Chart(
        title="Clipping",
        text="Fraction of the updates since the previous point that were clipped.",
        unit="fraction of the updates",
        tags=("clip/fraction",),
    ),
    Chart(
        title="Rejected updates",
        text="Updates rejected by each detector of the guard, since the beginning of the run.",
        unit="updates",
        tags=("guard/rejected/",),
    ),
    Chart(
        title="Global batch",
        text="Samples per update over all processes. Dashed: planned.",
        unit="samples",
        tags=("batch/global_size", "noise_scale/simple"),
        planned=("plan/global_size",),
    ),
    Chart(
        title="Update-to-weight ratio",
        text="Norm of one update relative to the norm of the weights, by layer.",
        unit="ratio",
        tags=("layers/update_ratio",),
        scale="log",
    ),
    Chart(
        title="Throughput",
        text="Samples per second over all processes, without validation.",
        unit="samples/s",
        tags=("throughput/samples_per_second",),
    ),
    Chart(
        title="Tokens per second",
        text="Over all processes, without validation.",
        unit="tokens/s",
        tags=("throughput/tokens_per_second",),
    ),
    Chart(
        title="Seconds per step",
        text="Median and 95th percentile of up to 128 recent steps, without validation.",
        unit="s",
        tags=("time/step",),
    ),
    Chart(
        title="GPU memory",
        text="Peak since the previous point, in GiB: allocated to tensors, and reserved.",
        unit="GiB",
        tags=("memory/",),
    ),
)


def draw(chart: Chart, runs: Sequence[Run]) -> str | None:
    """Draws a chart of one run, or of several runs side by side with a common scale.

    Args:
        chart: The specification of the chart.
        runs: The runs, from left to right.

    Returns:
        The chart as an SVG element; None if no run has a curve for it.
    """
    solid = [_select_curves(run, chart.tags) for run in runs]
    dashed = [_select_curves(run, chart.planned) for run in runs]
    if not any(solid):
        return None
    colors = _choose_colors(solid)
    is_log = _is_log(chart, [v for curves in solid for curve in curves.values() for _, v in curve])

    def paint(axes: Sequence[Axes]) -> None:
        for axis, run, lines, plan in zip(axes, runs, solid, dashed, strict=True):
            if is_log:
                axis.set_yscale("log")
            _draw_lines(axis, lines, colors, is_log=is_log)
            _draw_plan(axis, plan)
            axis.grid(alpha=0.25)
            axis.set_title(run.name if len(runs) > 1 else chart.title, fontsize=10)
            # Modules log losses per update, even if the x axis of the monitor has another unit.
            axis.set_xlabel("update" if chart.tags == _LOSSES else run.axis)
            if axis.get_legend_handles_labels()[1]:  # below the axes, so that it hides no curve
                axis.legend(
                    fontsize=8,
                    frameon=False,
                    loc="upper center",
                    bbox_to_anchor=(0.5, -0.2),
                    ncols=2,
                )
        axes[0].set_ylabel(chart.unit)

    entries = max(
        min(len(lines), _MAX_COLORED_CURVES) + len(plan)
        for lines, plan in zip(solid, dashed, strict=True)
    )
    return to_svg(new_picture(paint, columns=len(runs), rows_below=math.ceil(entries / 2)))


def _is_log(chart: Chart, values: Sequence[float]) -> bool:
    finite = [v for v in values if math.isfinite(v)]
    if chart.scale == "log":
        return any(v > 0 for v in finite)
    spikes = chart.scale == "log where it spikes" and bool(finite)
    return spikes and min(finite) > 0 and max(finite) > _SPIKE_RATIO * median(finite)


def _select_curves(run: Run, prefixes: Sequence[str]) -> dict[str, Curve]:
    if prefixes == _LOSSES:
        return {tag: curve for tag, curve in run.curves.items() if "loss" in tag.lower()}
    return run.select(*prefixes) if prefixes else {}


def _choose_colors(runs: Sequence[Mapping[str, Curve]]) -> dict[str, str]:
    """Returns the color of each tag, the same in every run.

    Of more than eight tags, only the three with the highest and the three with the lowest median
    get a color.
    """
    tags = list(dict.fromkeys(tag for curves in runs for tag in curves))
    if len(tags) > _MAX_COLORED_CURVES:
        tags.sort(key=lambda tag: -_median([curves.get(tag, []) for curves in runs]))
        tags = [*tags[:3], *tags[-3:]]
    return {tag: _COLORS[number % len(_COLORS)] for number, tag in enumerate(tags)}


def _median(curves: Sequence[Curve]) -> float:
    return median([v for curve in curves for _, v in curve if math.isfinite(v)] or [0.0])


def _draw_lines(
    axis: Axes, curves: Mapping[str, Curve], colors: Mapping[str, str], *, is_log: bool
) -> None:
    others = [tag for tag in curves if tag not in colors]
    for tag in others:
        label = f"{len(others)} between them" if tag == others[0] else None
        _draw_line(axis, curves[tag], label, _GRAY, is_log=is_log, alpha=0.5)
    for tag in sorted(curves.keys() & colors.keys(), key=list(colors).index):
        _draw_line(axis, curves[tag], tag, colors[tag], is_log=is_log)
        non_finite = [x for x, y in curves[tag] if not math.isfinite(y)]
        _mark_at_edge(axis, non_finite, "x", f"{tag} not finite")
        zeros = [x for x, y in curves[tag] if y == 0]
        if is_log and zeros:
            # matplotlib leaves labels with a leading underscore out of the legend.
            is_named = "zero" in axis.get_legend_handles_labels()[1]
            _mark_at_edge(axis, zeros, "v", "_zero" if is_named else "zero", colors[tag])


def _draw_line(
    axis: Axes, curve: Curve, label: str | None, color: str, *, is_log: bool, alpha: float = 1.0
) -> None:
    shown = [(x, y if y > 0 or not is_log else math.nan) for x, y in curve if math.isfinite(y)]
    xs, ys = [x for x, _ in shown], [y for _, y in shown]
    marker = "o" if len(shown) == 1 else None
    axis.plot(xs, ys, color=color, linewidth=1.2, label=label, marker=marker, alpha=alpha)


def _mark_at_edge(
    axis: Axes, xs: Sequence[float], sign: str, label: str, color: str = _RED
) -> None:
    """Marks values that the axis cannot show, such as NaN, at its lower edge."""
    if xs:
        edge = axis.get_xaxis_transform()
        axis.plot(xs, [0.02] * len(xs), sign, color=color, label=label, transform=edge, ms=4)


def _draw_plan(axis: Axes, curves: Mapping[str, Curve]) -> None:
    for number, (tag, curve) in enumerate(curves.items()):
        finite = [(x, y) for x, y in curve if math.isfinite(y)]
        axis.plot(
            [x for x, _ in finite],
            [y for _, y in finite],
            color=_COLORS[number % len(_COLORS)],
            linestyle="--",
            linewidth=1.0,
            alpha=0.6,
            label=tag,
        )


def new_picture(
    paint: Callable[[Sequence[Axes]], None], *, columns: int = 1, rows_below: int = 2
) -> Any:
    """Makes a matplotlib figure with axes in a row on a common scale, and paints it.

    Args:
        paint: Draws on the axes, from left to right.
        columns: Number of axes.
        rows_below: Rows of the legend below the axes; the figure grows by those beyond two.

    Returns:
        The ``matplotlib.figure.Figure``; it needs no display.
    """
    from matplotlib.figure import Figure

    size = (6.4 * columns if columns > 1 else 8.0, 3.0 + 0.17 * max(0, rows_below - 2))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(1, columns, sharex=True, sharey=True, squeeze=False)
    paint(list(grid[0]))
    return figure


def to_svg(figure: Any) -> str:
    """Renders a figure as an SVG element that can be embedded in an HTML page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})  # no date in the file
    text = buffer.getvalue()
    return text[text.index("<svg") :]
