"""Writes to TensorBoard: scalars in one event per step, a dashboard, and hyperparameters."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from lightning_bigopt.monitoring.event_records import fast_checksums, usual_checksums

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = [
    "DASHBOARD",
    "file_writer",
    "release",
    "write_curves",
    "write_dashboard",
    "write_hyperparameters",
    "write_scalars",
]

# Tags of OptimizationMonitor and of Lightning, and losses.
_NOT_OF_MODULE = (
    ".*[Ll]oss|optim/|plan/|grad_norm/|clip/|batch/|noise_scale/|layers/|update_ratio/|guard/"
    "|rollback/|stability/|activations/|communication/|progress/|throughput/|time/|memory/"
    "|histograms/|lr-|epoch$|hp_metric$"
)

DASHBOARD: Mapping[str, Mapping[str, Sequence[str]]] = {
    "training": {
        "losses, training and validation": ("(?!rollback/loss_|stability/).*[Ll]oss.*",),
        "other metrics of the module": (f"(?!{_NOT_OF_MODULE}).*",),
    },
    "optimization": {
        "learning rate, planned and used": ("plan/lr.*", "optim/lr.*"),
        "gradient norm and clip threshold": ("grad_norm/total.*", "clip/threshold.*"),
        "fraction of updates clipped": ("clip/fraction.*",),
        "global batch, planned and used": ("plan/global_size", "batch/global_size"),
        "noise scale, samples": ("noise_scale/simple",),
        "update-to-weight ratio, quantiles over the layers": ("update_ratio/.*",),
        "rejected updates, by detector": ("guard/rejected/.*",),
        "spike scores of loss and norm": ("stability/spike_score/.*",),
    },
    "speed": {
        "samples per second": ("throughput/samples_per_second",),
        "tokens per second": ("throughput/tokens_per_second",),
        "seconds per step": ("time/.*",),
        "GPU memory, GiB": ("memory/.*",),
    },
}
"""The custom-scalars dashboard: category → title of a chart → patterns of its tags.

Give a chart a new title if its patterns change: TensorBoard would show two charts with the same
title next to older runs.
"""


@dataclass
class _Layout:
    """The charts in the last layout of a writer, and all tags until then."""

    tags: set[str] = field(default_factory=set)
    charts: dict[str, list[str]] = field(default_factory=dict)


_layouts: WeakKeyDictionary[SummaryWriter, _Layout] = WeakKeyDictionary()


def write_scalars(writer: SummaryWriter, values: Mapping[str, float], *, step: int) -> None:
    """Writes all values in one event; ``add_scalar`` writes one event per value.

    Args:
        writer: The writer of the logger.
        values: Values by tag.
        step: Step of the event.
    """
    summary = _summary_type()()
    add = summary.value.add  # faster than Summary(value=[...]), which copies each message
    for tag, value in values.items():
        add(tag=tag, simple_value=value)
    files = file_writer(writer)
    fast_checksums(files.event_writer)
    files.add_summary(summary, step)


@cache
def _summary_type() -> Any:
    # Imported late: this import takes longer than that of the whole package.
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary


def write_curves(writer: SummaryWriter, points: Iterable[tuple[int, Mapping[str, float]]]) -> None:
    """Writes the points of planned curves, each a step and values by tag."""
    for step, values in points:
        if values:
            write_scalars(writer, values, step=step)


def write_dashboard(writer: SummaryWriter, tags: Collection[str], *, prefix: str = "") -> None:
    """Writes a layout with the charts of :data:`DASHBOARD` whose tags have been logged.

    TensorBoard shows an empty chart for tags that do not exist, uses the last layout of a run, and
    merges the layouts of several runs by equal charts. A chart is therefore written with all its
    patterns or not at all.

    Args:
        writer: The writer of the logger.
        tags: The tags of the current event.
        prefix: Prefix that the logger adds to each tag.
    """
    layout = _layouts.get(writer)
    if layout is None:
        layout = _layouts[writer] = _Layout()
    if layout.tags.issuperset(tags):
        return
    layout.tags.update(tags)
    found = {
        title: [re.escape(prefix) + pattern for pattern in patterns]
        for charts in DASHBOARD.values()
        for title, patterns in charts.items()
        if any(re.match(re.escape(prefix) + p, tag) for p in patterns for tag in tags)
    }
    if found.keys() <= layout.charts.keys():
        return
    layout.charts.update(found)
    writer.add_custom_scalars(
        {
            category: {
                title: ["Multiline", layout.charts[title]]
                for title in charts
                if title in layout.charts
            }
            for category, charts in DASHBOARD.items()
            if not layout.charts.keys().isdisjoint(charts)
        }
    )


def write_hyperparameters(
    writer: SummaryWriter, values: Mapping[str, Any], *, metrics: Mapping[str, float]
) -> None:
    """Writes a row of TensorBoard's HParams tab.

    TensorBoard reads the row of a run only once, and shows the last logged value of each metric.

    Args:
        writer: The writer of the logger.
        values: Hyperparameters by name; values of other types than bool, int, float and str are
            converted to str.
        metrics: Final values by tag; the tags must be logged in the same run.
    """
    from torch.utils.tensorboard.summary import hparams

    plain = {
        key: value if isinstance(value, (bool, int, float, str)) else str(value)
        for key, value in values.items()
    }
    describe: Any = hparams  # untyped
    for summary in describe(plain, dict(metrics)):
        file_writer(writer).add_summary(summary)


def release(writer: SummaryWriter) -> None:
    """Undoes what :func:`write_scalars` has changed in a writer."""
    usual_checksums(file_writer(writer).event_writer)


def file_writer(writer: Any) -> Any:
    """Returns the file writer, which accepts events; Lightning's logger uses it too."""
    return writer._get_file_writer()  # noqa: SLF001
