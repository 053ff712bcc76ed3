"""Pictures of runs, drawn by matplotlib without a display."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_bigopt.reporting.runs import Curve, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["CHARTS", "Chart", "draw", "new_picture", "to_svg"]

_COLOURS = ("#2b6cb0", "#dd6b20", "#2f855a", "#805ad5", "#b83280", "#4a5568")
_MANY = 8


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One picture of a report.

    Args:
        title: Its heading.
        text: How to read it.
        tags: Prefixes of the tags that are drawn as lines.
        planned: Prefixes of those drawn dashed, as plan or limit.
        log: Whether values are on a logarithmic axis where they are all positive.
    """

    title: str
    text: str
    tags: tuple[str, ...]
    planned: tuple[str, ...] = ()
    log: bool = False


CHARTS: tuple[Chart, ...] = (
    Chart(
        title="Loss",
        text="Everything logged whose name has the word loss in it.",
        tags=("*loss*",),
    ),
    Chart(
        title="Learning rate",
        text="Dashed: as planned before the first update. Solid: as used.",
        tags=("optim/lr",),
        planned=("plan/lr",),
    ),
    Chart(
        title="Gradient norm",
        text="Before clipping. Dashed: the norm from which on clipping acted.",
        tags=("grad_norm/total",),
        planned=("clip/threshold",),
        log=True,
    ),
    Chart(
        title="Clipping",
        text="Share of the updates between two points that were clipped.",
        tags=("clip/fraction",),
    ),
    Chart(
        title="Refused updates",
        text="Updates that each detector of the guard has objected to since the beginning.",
        tags=("guard/rejected/",),
    ),
    Chart(
        title="Global batch",
        text="Samples in an update over all processes. Dashed: as planned.",
        tags=("batch/global_size", "noise_scale/simple"),
        planned=("plan/global_size",),
    ),
    Chart(
        title="Update-to-weight ratio",
        text="How far one update moved the weights, relative to their norm, by layer.",
        tags=("layers/update_ratio",),
        log=True,
    ),
    Chart(
        title="Throughput",
        text="Samples per second over all processes, validation left out.",
        tags=("throughput/samples_per_second",),
    ),
    Chart(
        title="Tokens per second",
        text="Over all processes, validation left out.",
        tags=("throughput/tokens_per_second",),
    ),
    Chart(
        title="Seconds per step",
        text="Median and 95th percentile of the last 128 steps at most, validation left out.",
        tags=("time/step",),
    ),
    Chart(
        title="GPU memory",
        text="The most since the point before, in GiB: in tensors, and held by the allocator.",
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
    drawn = [[_wanted(run, chart.tags), _wanted(run, chart.planned)] for run in runs]
    if not any(solid for solid, _ in drawn):
        return None

    def paint(axes: Sequence[Axes]) -> None:
        for axis, run, (solid, dashed) in zip(axes, runs, drawn, strict=True):
            _lines(axis, solid, dashed)
            values = [v for curve in solid.values() for _, v in curve if math.isfinite(v)]
            if chart.log and values and min(values) > 0:
                axis.set_yscale("log")
            axis.set_title(run.name if len(runs) > 1 else chart.title, fontsize=10)
            axis.set_xlabel("step")

    return to_svg(new_picture(paint, columns=len(runs)))


def _wanted(run: Run, prefixes: Sequence[str]) -> dict[str, Curve]:
    if prefixes == ("*loss*",):
        return {tag: curve for tag, curve in run.curves.items() if "loss" in tag.lower()}
    return run.select(*prefixes) if prefixes else {}


def _lines(axis: Axes, solid: dict[str, Curve], dashed: dict[str, Curve]) -> None:
    for number, (tag, curve) in enumerate(solid.items()):
        finite = [(x, y) for x, y in curve if math.isfinite(y)]
        xs, ys = [x for x, _ in finite], [y for _, y in finite]
        marker = "o" if len(finite) == 1 else None
        colour = _COLOURS[number % len(_COLOURS)]
        axis.plot(xs, ys, color=colour, linewidth=1.2, label=tag, marker=marker)
        lost = [x for x, y in curve if not math.isfinite(y)]
        if lost:
            axis.plot(
                lost,
                [0.02] * len(lost),
                "x",
                color="#c53030",
                label=f"{tag} not finite",
                transform=axis.get_xaxis_transform(),
            )
    for number, (tag, curve) in enumerate(dashed.items()):
        finite = [(x, y) for x, y in curve if math.isfinite(y)]
        axis.plot(
            [x for x, _ in finite],
            [y for _, y in finite],
            color=_COLOURS[number % 6],
            linestyle="--",
            linewidth=1.0,
            alpha=0.6,
            label=tag,
        )
    axis.grid(alpha=0.25)
    if 0 < len(solid) + len(dashed) <= _MANY:  # below the axes, where it hides nothing
        axis.legend(
            fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2
        )


def new_picture(paint: Callable[[Sequence[Axes]], None], *, columns: int = 1) -> Any:
    """A matplotlib figure of some axes in a row with a common scale, painted; no display needed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * columns if columns > 1 else 8.0, 3.0), layout="constrained")
    grid = figure.subplots(1, columns, sharex=True, sharey=True, squeeze=False)
    paint(list(grid[0]))
    return figure


def to_svg(figure: Any) -> str:
    """The figure as an SVG element, to be put into a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
