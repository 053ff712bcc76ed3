"""A run before it begins: a table, a picture, and what will surprise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_bigopt.reporting.charts import new_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Boundary", "PlanRow", "TrainingPlan"]


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One update of the plan.

    Args:
        update: Its number, from 0.
        fraction: The share of the budget spent before it.
        epoch: Passes over the data before it; None for a loader without length.
        samples: Samples over all processes before it; None where unknown.
        tokens: Tokens before it; None where unknown.
        learning_rates: By parameter group.
        global_batch_size: Samples in it over all processes; None where unknown.
        accumulate: Its micro-batches of one process.
    """

    update: int
    fraction: float
    epoch: float | None
    samples: int | None
    tokens: int | None
    learning_rates: dict[str, float]
    global_batch_size: float | None
    accumulate: int


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """Where a stage of a schedule begins or ends.

    Args:
        name: Such as ``"warmup ends"``.
        update: The first update behind it.
    """

    name: str
    update: int


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """A run before it begins.

    Args:
        totals: The whole run by unit.
        rows: Updates spread over the run, the first and the last among them.
        boundaries: Where stages begin and end.
        checkpoints: What is saved when, a line each.
        warnings: What will surprise, a sentence each.

    Example:
        >>> row = PlanRow(
        ...     update=0,
        ...     fraction=0.0,
        ...     epoch=0.0,
        ...     samples=0,
        ...     tokens=None,
        ...     learning_rates={"lr": 0.1},
        ...     global_batch_size=8,
        ...     accumulate=1,
        ... )
        >>> print(TrainingPlan(totals={"updates": 10.0}, rows=(row,)))
        updates: 10
        <BLANKLINE>
        update      %    epoch     samples  batch  accum.  lr
             0    0.0     0.00           0      8       1  1.000e-01
    """

    totals: dict[str, float]
    rows: tuple[PlanRow, ...]
    boundaries: tuple[Boundary, ...] = ()
    checkpoints: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{unit}: {_number(total)}" for unit, total in self.totals.items()]
        lines += [f"{stage.name}: update {stage.update:,}" for stage in self.boundaries]
        lines += [f"checkpoint: {line}" for line in self.checkpoints]
        if self.rows:
            groups = list(self.rows[0].learning_rates)
            head = f"{'update':>6}  {'%':>5}  {'epoch':>7}  {'samples':>10}  {'batch':>5}  accum."
            lines += ["", "  ".join([head, *(f"{group:<9}" for group in groups)]).rstrip()]
            lines += [_line(row) for row in _few(self.rows, 12)]
        if self.warnings:
            lines += ["", *(f"warning: {text}" for text in self.warnings)]
        return "\n".join(lines)

    def picture(self, path: str | Path) -> Path:
        """Draws learning rates and batch over the updates; the suffix chooses the format.

        Args:
            path: Such as ``"plan.png"`` or ``"plan.svg"``.

        Returns:
            The path.
        """
        figure = new_picture(lambda axes: self._paint(axes[0]))
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=120)
        return target

    def _paint(self, axis: Axes) -> None:
        updates = [row.update for row in self.rows]
        for group in self.rows[0].learning_rates if self.rows else ():
            axis.plot(updates, [row.learning_rates[group] for row in self.rows], label=group)
        axis.set_xlabel("update")
        axis.set_ylabel("learning rate")
        for stage in self.boundaries:
            axis.axvline(stage.update, color="#a0aec0", linestyle=":", linewidth=1)
            axis.text(
                stage.update,
                1.01,
                stage.name,
                fontsize=7,
                ha="center",
                transform=axis.get_xaxis_transform(),
            )
        sizes = [row.global_batch_size for row in self.rows]
        if None not in sizes:
            beside = axis.twinx()
            beside.step(updates, sizes, where="post", color="#dd6b20", linewidth=1, alpha=0.7)  # type: ignore[arg-type]
            beside.set_ylabel("global batch", color="#dd6b20")
            beside.set_ylim(bottom=0)
        axis.legend(fontsize=8, frameon=False, loc="lower center")


def _few(rows: Sequence[PlanRow], count: int) -> list[PlanRow]:
    if len(rows) <= count:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (count - 1))] for i in range(count)]


def _line(row: PlanRow) -> str:
    epoch = "" if row.epoch is None else f"{row.epoch:.2f}"
    samples = "" if row.samples is None else f"{row.samples:,}"
    size = "" if row.global_batch_size is None else f"{row.global_batch_size:,.0f}"
    rates = "  ".join(f"{rate:.3e}" for rate in row.learning_rates.values())
    return (
        f"{row.update:>6}  {100 * row.fraction:>5.1f}  {epoch:>7}  {samples:>10}  {size:>5}  "
        f"{row.accumulate:>6}  {rates}"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:,.2f}"
