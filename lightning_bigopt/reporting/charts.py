"""Pictures of runs, drawn by matplotlib without a display."""

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
_MANY = 8
_SPIKE = 20
_LOSSES = ("*loss*",)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One picture of a report.

    Args:
        title: Its heading.
        text: How to read it.
        unit: What the upright axis counts.
        tags: Prefixes of the tags that are drawn as lines.
        planned: Prefixes of those drawn dashed, as plan or limit.
        scale: ``"log"`` for a logarithmic axis, with zeros marked at its lower edge;
            ``"log where it spikes"`` where one value would press all others to the floor.
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
        text="Everything logged whose name has the word loss in it.",
        unit="loss",
        tags=_LOSSES,
        scale="log where it spikes",
    ),
    Chart(
        title="Learning rate",
        text="Dashed: as planned before the first update. Solid: as used.",
        unit="learning rate",
        tags=("optim/lr",),
        planned=("plan/lr",),
    ),
    Chart(
        title="Gradient norm",
        text="Before clipping. Dashed: the norm from which on clipping acted.",
        unit="norm",
        tags=("grad_norm/total",),
        planned=("clip/threshold",),
        scale="log",
    ),
    Chart(
        title="Clipping",
        text="Share of the updates between two points that were clipped.",
        unit="share of the updates",
        tags=("clip/fraction",),
    ),
    Chart(
        title="Refused updates",
        text="Updates that each detector of the guard has objected to since the beginning.",
        unit="updates",
        tags=("guard/rejected/",),
    ),
    Chart(
        title="Global batch",
        text="Samples in an update over all processes. Dashed: as planned.",
        unit="samples",
        tags=("batch/global_size", "noise_scale/simple"),
        planned=("plan/global_size",),
    ),
    Chart(
        title="Update-to-weight ratio",
        text="How far one update moved the weights, relative to their norm, by layer.",
        unit="ratio",
        tags=("layers/update_ratio",),
        scale="log",
    ),
    Chart(
        title="Throughput",
        text="Samples per second over all processes, validation left out.",
        unit="samples/s",
        tags=("throughput/samples_per_second",),
    ),
    Chart(
        title="Tokens per second",
        text="Over all processes, validation left out.",
        unit="tokens/s",
        tags=("throughput/tokens_per_second",),
    ),
    Chart(
        title="Seconds per step",
        text="Median and 95th percentile of the last 128 steps at most, validation left out.",
        unit="s",
        tags=("time/step",),
    ),
    Chart(
        title="GPU memory",
        text="The most since the point before, in GiB: in tensors, and held by the allocator.",
        unit="GiB",
        tags=("memory/",),
    ),
)


def draw(chart: Chart, runs: Sequence[Run]) -> str | None:
    """A chart of one run, or of several beside each other on the same axes, as SVG.

    Args:
        chart: What to draw.
        runs: Whose.

    Returns:
        The picture; None where no run has anything to show.
    """
    solid = [_wanted(run, chart.tags) for run in runs]
    dashed = [_wanted(run, chart.planned) for run in runs]
    if not any(solid):
        return None
    colors = _colors(solid)
    is_log = _is_log(chart, [v for curves in solid for curve in curves.values() for _, v in curve])

    def paint(axes: Sequence[Axes]) -> None:
        for axis, run, lines, plan in zip(axes, runs, solid, dashed, strict=True):
            if is_log:
                axis.set_yscale("log")
            _lines(axis, lines, colors, is_log=is_log)
            _plan(axis, plan)
            axis.grid(alpha=0.25)
            axis.set_title(run.name if len(runs) > 1 else chart.title, fontsize=10)
            axis.set_xlabel("update" if chart.tags == _LOSSES else run.axis)
            if axis.get_legend_handles_labels()[1]:  # below the axes, where it hides nothing
                axis.legend(
                    fontsize=8,
                    frameon=False,
                    loc="upper center",
                    bbox_to_anchor=(0.5, -0.2),
                    ncols=2,
                )
        axes[0].set_ylabel(chart.unit)

    entries = max(
        min(len(lines), _MANY) + len(plan) for lines, plan in zip(solid, dashed, strict=True)
    )
    return to_svg(new_picture(paint, columns=len(runs), rows_below=math.ceil(entries / 2)))


def _is_log(chart: Chart, values: Sequence[float]) -> bool:
    finite = [v for v in values if math.isfinite(v)]
    if chart.scale == "log":
        return any(v > 0 for v in finite)
    spikes = chart.scale == "log where it spikes" and bool(finite)
    return spikes and min(finite) > 0 and max(finite) > _SPIKE * median(finite)


def _wanted(run: Run, prefixes: Sequence[str]) -> dict[str, Curve]:
    if prefixes == _LOSSES:
        return {tag: curve for tag, curve in run.curves.items() if "loss" in tag.lower()}
    return run.select(*prefixes) if prefixes else {}


def _colors(runs: Sequence[Mapping[str, Curve]]) -> dict[str, str]:
    """The color of each tag, the same in every run; of many only the extremes have one."""
    tags = list(dict.fromkeys(tag for curves in runs for tag in curves))
    if len(tags) > _MANY:
        tags.sort(key=lambda tag: -_typical([curves.get(tag, []) for curves in runs]))
        tags = [*tags[:3], *tags[-3:]]
    return {tag: _COLORS[number % len(_COLORS)] for number, tag in enumerate(tags)}


def _typical(curves: Sequence[Curve]) -> float:
    return median([v for curve in curves for _, v in curve if math.isfinite(v)] or [0.0])


def _lines(
    axis: Axes, curves: Mapping[str, Curve], colors: Mapping[str, str], *, is_log: bool
) -> None:
    others = [tag for tag in curves if tag not in colors]
    for tag in others:
        label = f"{len(others)} between them" if tag == others[0] else None
        _line(axis, curves[tag], label, _GRAY, is_log=is_log, alpha=0.5)
    for tag in sorted(curves.keys() & colors.keys(), key=list(colors).index):
        _line(axis, curves[tag], tag, colors[tag], is_log=is_log)
        _mark(axis, [x for x, y in curves[tag] if not math.isfinite(y)], "x", f"{tag} not finite")
        zeros = [x for x, y in curves[tag] if y == 0]
        if is_log and zeros:
            is_named = "zero" in axis.get_legend_handles_labels()[1]
            _mark(axis, zeros, "v", "_zero" if is_named else "zero", colors[tag])


def _line(
    axis: Axes, curve: Curve, label: str | None, color: str, *, is_log: bool, alpha: float = 1.0
) -> None:
    shown = [(x, y if y > 0 or not is_log else math.nan) for x, y in curve if math.isfinite(y)]
    xs, ys = [x for x, _ in shown], [y for _, y in shown]
    marker = "o" if len(shown) == 1 else None
    axis.plot(xs, ys, color=color, linewidth=1.2, label=label, marker=marker, alpha=alpha)


def _mark(axis: Axes, places: Sequence[float], sign: str, label: str, color: str = _RED) -> None:
    """Marks at the lower edge what has no place on the axis."""
    if places:
        edge = axis.get_xaxis_transform()
        axis.plot(
            places, [0.02] * len(places), sign, color=color, label=label, transform=edge, ms=4
        )


def _plan(axis: Axes, curves: Mapping[str, Curve]) -> None:
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
    """A matplotlib figure of some axes in a row with a common scale, painted; no display needed."""
    from matplotlib.figure import Figure

    size = (6.4 * columns if columns > 1 else 8.0, 3.0 + 0.17 * max(0, rows_below - 2))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(1, columns, sharex=True, sharey=True, squeeze=False)
    paint(list(grid[0]))
    return figure


def to_svg(figure: Any) -> str:
    """The figure as an SVG element, to be put into a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
