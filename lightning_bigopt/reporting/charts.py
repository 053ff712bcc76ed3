"""The specifications of the charts of a report."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Literal

from lightning_bigopt.reporting.runs import Curve, Run

__all__ = ["CHARTS", "Chart", "is_loss"]

# A maximum above this multiple of the median is a spike.
_SPIKE_RATIO = 20
# Stands for all tags that contain the word loss; no other chart matches inside a tag.
_LOSSES = ("*loss*",)


def is_loss(tag: str) -> bool:
    """Returns whether a tag is drawn as a loss: its name contains the word, and is no other figure.

    Example:
        >>> (
        ...     is_loss("val/Loss"),
        ...     is_loss("stability/spike_score/loss"),
        ...     is_loss("rollback/loss_after"),
        ... )
        (True, False, False)
    """
    return "loss" in tag.lower() and not tag.startswith(("rollback/loss_", "stability/"))


@dataclass(frozen=True, kw_only=True)
class Chart:
    """The specification of one chart of a report.

    Args:
        title: Heading of the chart.
        text: Explanation shown below the heading.
        unit: Label of the vertical axis.
        tags: Prefixes of the tags that are drawn as solid lines.
        older_tags: Prefixes that replace ``tags`` for a run that has not logged them.
        planned: Prefixes of the tags that are drawn dashed: plans and limits.
        planned_label: The entry of the dashed lines in the legend.
        scale: ``"log"`` for a logarithmic axis, with zeros marked at its lower edge;
            ``"log where it spikes"`` for a logarithmic axis only if the largest value is more than
            20 times the median.
        limits: Ends of the vertical axis; None for those of the values.
    """

    title: str
    text: str
    unit: str
    tags: tuple[str, ...]
    older_tags: tuple[str, ...] = ()
    planned: tuple[str, ...] = ()
    planned_label: str = "planned"
    scale: Literal["linear", "log", "log where it spikes"] = "linear"
    limits: tuple[float, float] | None = None

    @property
    def is_logged_by_module(self) -> bool:
        """Whether the values are logged per update, even if the monitor's x axis is another."""
        return self.tags == _LOSSES

    def prefixes_for(self, run: Run) -> tuple[str, ...]:
        """Returns :attr:`tags`, or :attr:`older_tags` for a run that has logged only those."""
        uses_older = self.older_tags and not run.select(*self.tags)
        return self.older_tags if uses_older else self.tags

    def curves(self, run: Run) -> dict[str, Curve]:
        """Returns the curves of a run that are drawn as solid lines, by tag."""
        if self.tags == _LOSSES:
            return {tag: curve for tag, curve in run.curves.items() if is_loss(tag)}
        return run.select(*self.prefixes_for(run))

    def planned_curves(self, run: Run) -> dict[str, Curve]:
        """Returns the curves of a run that are drawn as dashed lines, by tag."""
        return run.select(*self.planned) if self.planned else {}

    def is_logarithmic(self, values: Iterable[float]) -> bool:
        """Returns whether the vertical axis for some values is logarithmic."""
        finite = [value for value in values if math.isfinite(value)]
        if self.scale == "log":
            return any(value > 0 for value in finite)
        spikes = self.scale == "log where it spikes" and bool(finite)
        return spikes and min(finite) > 0 and max(finite) > _SPIKE_RATIO * median(finite)


CHARTS: tuple[Chart, ...] = (
    Chart(
        title="Loss",
        text="All logged values whose name contains the word loss. Updates that a rollback has "
        "undone are drawn as rollback/discarded_loss.",
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
        planned_label="threshold",
        scale="log",
    ),
    Chart(
        title="Clipping",
        text="Fraction of the updates since the previous point that were clipped.",
        unit="fraction of the updates",
        tags=("clip/fraction",),
        limits=(-0.05, 1.05),
    ),
    Chart(
        title="Rejected updates",
        text="Updates rejected by each detector of the guard, since the beginning of the run.",
        unit="updates",
        tags=("guard/rejected/",),
    ),
    Chart(
        title="Spike scores",
        text="Fraction of the compared updates whose loss or gradient norm was a spike, since the "
        "beginning of the run.",
        unit="fraction of the updates",
        tags=("stability/spike_score/",),
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
        text="Norm of one update relative to the norm of the weights: minimum, median and maximum "
        "over the layers, or each layer for a log of an earlier version.",
        unit="ratio",
        tags=("update_ratio/",),
        older_tags=("layers/update_ratio/",),
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
