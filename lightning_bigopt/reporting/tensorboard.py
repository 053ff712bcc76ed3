"""What TensorBoard gets beyond scalars: one event a step, a dashboard, a plan, hyperparameters."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = [
    "DASHBOARD",
    "forget_after",
    "write_curves",
    "write_dashboard",
    "write_hyperparameters",
    "write_scalars",
]

DASHBOARD: Mapping[str, Mapping[str, Sequence[str]]] = {
    "optimization": {
        "learning rate, planned and used": ("plan/lr.*", "optim/lr.*"),
        "gradient norm and clip threshold": ("grad_norm/total.*", "clip/threshold.*"),
        "share of updates clipped": ("clip/fraction.*",),
        "global batch, planned and used": ("plan/global_size", "batch/global_size"),
        "noise scale, samples": ("noise_scale/simple",),
        "update-to-weight ratio": ("layers/update_ratio/.*",),
        "updates refused, by detector": ("guard/rejected/.*",),
    },
    "speed": {
        "samples per second": ("throughput/samples_per_second",),
        "tokens per second": ("throughput/tokens_per_second",),
        "seconds per step": ("time/.*",),
        "GPU memory, GiB": ("memory/.*",),
    },
}
"""The custom-scalars dashboard: charts by category, and the tags that each shows.

A chart whose tags change needs a new title: beside older runs TensorBoard would show both.
"""


@dataclass
class _Layout:
    """The charts that a writer has laid out, and how many tags there were then."""

    tags: int = 0
    charts: dict[str, list[str]] = field(default_factory=dict)


_layouts: WeakKeyDictionary[SummaryWriter, _Layout] = WeakKeyDictionary()


def write_scalars(writer: SummaryWriter, values: Mapping[str, float], *, step: int) -> None:
    """Writes all values as one event; ``add_scalar`` writes one event a value.

    The event is handed to the writer's thread, which appends it to the file at once.
    """
    summary = _summary_type()()
    add = summary.value.add  # faster than a list that protobuf copies
    for tag, value in values.items():
        add(tag=tag, simple_value=value)
    _files(writer).add_summary(summary, step)


@cache
def _summary_type() -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary  # costs more than all of ours

    return Summary


def write_curves(writer: SummaryWriter, points: Iterable[tuple[int, Mapping[str, float]]]) -> None:
    """Writes curves that are known in advance."""
    for step, values in points:
        if values:
            write_scalars(writer, values, step=step)


def forget_after(writer: SummaryWriter, step: int) -> None:
    """Tells readers of the run to drop what a killed predecessor logged from ``step`` on."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    event = Event(step=step, session_log=SessionLog(status=SessionLog.START))
    _files(writer).add_event(event, step)


def write_dashboard(writer: SummaryWriter, tags: Collection[str], *, prefix: str = "") -> None:
    """Lays out the charts of :data:`DASHBOARD` that have something to show.

    TensorBoard shows an empty chart for tags that do not exist, takes the last layout of a run,
    and puts together those of several runs by equal charts: so a chart is whole or left out.

    Args:
        writer: Where to.
        tags: What has been logged now; looked at where there is more or less of it than before.
        prefix: What the logger put before each tag.
    """
    layout = _layouts.get(writer)
    if layout is None:
        layout = _layouts[writer] = _Layout()
    if len(tags) == layout.tags:
        return
    layout.tags = len(tags)
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
    folder: Path, values: Mapping[str, Any], *, metrics: Mapping[str, float]
) -> None:
    """Writes hyperparameters with final metrics into a run of their own beside the curves.

    A run's hyperparameters cannot be written twice, and Lightning may have written the module's,
    with a metric of -1, before training.
    """
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    plain = {
        key: value if isinstance(value, (bool, int, float, str)) else str(value)
        for key, value in values.items()
    }
    writer = SummaryWriter(str(folder))
    try:
        describe: Any = hparams  # untyped
        for summary in describe(plain, dict(metrics)):
            _files(writer).add_summary(summary)
        write_scalars(writer, metrics, step=0)
    finally:
        writer.close()


def _files(writer: Any) -> Any:
    """What appends whole events to the run's file; Lightning's logger takes the same way."""
    return writer._get_file_writer()  # noqa: SLF001
