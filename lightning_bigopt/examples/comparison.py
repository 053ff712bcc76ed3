"""Compares finished runs in a table and a picture, from their TensorBoard logs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_bigopt.reporting.picture import set_number_format

__all__ = ["Run", "draw_comparison", "markdown_table", "read_scalars"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished run, with the scalars of its log.

    Args:
        title: Name of the run in table and picture.
        seconds: Wall-clock time of training, without validation.
        scalars: Logged scalars: tag → step → value.

    Example:
        >>> norms = {0: 0.5, 1: float("inf")}
        >>> Run(title="a", seconds=1, scalars={"grad_norm/total": norms}).non_finite_steps
        1
    """

    title: str
    seconds: float
    scalars: dict[str, dict[int, float]]

    @property
    def peak_lr(self) -> float:
        """Largest learning rate of all updates and parameter groups."""
        rates = [rate for tag, rate in self.scalars.items() if tag.startswith("optim/lr")]
        return max(max(by_step.values()) for by_step in rates)

    @property
    def validation_loss(self) -> float:
        """Validation loss after the last update, in nats per byte."""
        return list(self.scalars["val_loss"].values())[-1]

    @property
    def updates(self) -> int:
        """Number of optimizer updates."""
        return len(self.scalars["grad_norm/total"])

    @property
    def samples(self) -> int:
        """Number of training samples, over all processes."""
        return round(max(self.scalars["progress/samples"].values()))

    @property
    def non_finite_steps(self) -> int:
        """Number of updates whose gradient had a NaN or an infinity."""
        return sum(not math.isfinite(norm) for norm in self.scalars["grad_norm/total"].values())


def read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Reads all scalars from the TensorBoard log of a folder: tag → step → value."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def markdown_table(runs: Sequence[Run]) -> str:
    """Formats the runs as columns of a Markdown table."""
    rows = [
        ["", *(run.title for run in runs)],
        ["peak learning rate", *(f"{run.peak_lr:.3g}" for run in runs)],
        ["validation loss (nats/byte)", *(f"{run.validation_loss:.3f}" for run in runs)],
        ["optimizer updates", *(str(run.updates) for run in runs)],
        ["samples", *(str(run.samples) for run in runs)],
        ["wall-clock (s)", *(f"{run.seconds:.1f}" for run in runs)],
        ["non-finite steps", *(str(run.non_finite_steps) for run in runs)],
    ]
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    separator = ["-" * first, *("-" * (width - 1) + ":" for width in others)]
    rows.insert(1, separator)
    return "\n".join(
        f"| {name.ljust(first)} | "
        + " | ".join(cell.rjust(width) for cell, width in zip(cells, others, strict=True))
        + " |"
        for name, *cells in rows
    )


def draw_comparison(runs: Sequence[Run], path: Path) -> None:
    """Draws learning rate, gradient norm, batch size and loss over the samples seen.

    Args:
        runs: The runs; the first is drawn in color, on top of the others.
        path: Image file to write; its suffix selects the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    (rate, norm), (batch, loss) = panels
    for index, run in reversed(list(enumerate(runs))):
        color = "tab:orange" if index == 0 else str(min(0.1 + 0.25 * index, 0.9))
        label = f"{run.title}, peak {run.peak_lr:.3g}"
        rate.plot(*_curve(run, "optim/lr/decay"), color=color, label=label)
        norm.plot(*_curve(run, "grad_norm/total"), color=color, linewidth=0.6)
        batch.step(*_curve(run, "batch/global_size"), color=color, where="post")
        samples, losses = _curve(run, "loss")
        loss.plot(samples, _smooth(losses), color=color)
        loss.plot(run.samples, run.validation_loss, "o", color=color)
    norm.set_yscale("log")
    set_number_format(norm, is_log=True)
    batch.set_ylim(bottom=0)
    loss.set_ylim(top=3)
    for panel, title in zip(
        panels.flat,
        (
            "Learning rate",
            "Gradient norm, before clipping",
            "Global batch (samples)",
            "Loss (nats/byte), smoothed; dots: validation",
        ),
        strict=True,
    ):
        panel.set_title(title, fontsize="medium")
        panel.grid(alpha=0.3)
    for panel in panels[1]:
        panel.set_xlabel("samples seen")
    handles, labels = rate.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _curve(run: Run, tag: str) -> tuple[list[float], list[float]]:
    """Returns the samples seen before each update, and the values of the updates."""
    seen, values = run.scalars["progress/samples"], run.scalars[tag]
    sizes = run.scalars["batch/global_size"]
    steps = [step for step in values if step in seen]
    return [seen[step] - sizes[step] for step in steps], [values[step] for step in steps]


def _smooth(values: Iterable[float], *, keep: float = 0.95) -> list[float]:
    """Computes a bias-corrected exponential moving average."""
    sums = accumulate(values, lambda total, value: keep * total + (1 - keep) * value, initial=0.0)
    return [total / (1 - keep**count) for count, total in enumerate(sums) if count]
