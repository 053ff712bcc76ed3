"""The result of ``plan()``: a table of updates, stage boundaries, warnings and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_bigopt.planning.expected_loss import ExpectedLoss, ranking

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Boundary", "PlanRow", "TrainingPlan"]


_GRAY = "#718096"  # the color of the batch size; learning rates use matplotlib's color cycle


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One update of the plan, or one fraction of a budget whose updates are unknown.

    Args:
        update: Index of the update, from 0; None if unknown.
        fraction: Fraction of the budget consumed before the update.
        epoch: Epochs completed before the update; None for a loader without a length.
        samples: Samples consumed before the update, over all processes; None if unknown.
        tokens: Tokens consumed before the update, over all processes; None if unknown.
        learning_rates: Learning rate of the update for each parameter group, by name.
        global_batch_size: Samples in the update over all processes; None if unknown.
        accumulate: Micro-batches of the update on one process; None if unknown.
    """

    update: int | None
    fraction: float
    epoch: float | None
    samples: int | None
    tokens: int | None
    learning_rates: dict[str, float]
    global_batch_size: float | None
    accumulate: int | None

    @property
    def percent(self) -> float:
        """The fraction of the budget consumed before the update, in percent."""
        return 100 * self.fraction


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """The beginning or end of a stage of a schedule.

    Args:
        name: Name of the boundary, such as ``"warmup ends"``.
        update: Index of the first update after the boundary; None if the updates are not known in
            advance.
        fraction: Position of the boundary as a fraction of the budget.
    """

    name: str
    update: int | None
    fraction: float

    def __str__(self) -> str:
        at = f"{100 * self.fraction:.1f} %" if self.update is None else f"update {self.update:,}"
        return f"{self.name}: {at}"


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """The plan of a run; ``print`` shows it as a table.

    Args:
        totals: Length of the run in each unit that is known, such as ``{"updates": 1000.0}``.
        rows: Updates spread over the run, including the first and the last.
        boundaries: Beginnings and ends of the stages of the learning-rate schedule.
        checkpoints: One line for each checkpoint callback.
        warnings: One sentence for each likely mistake.
        expected_losses: What a loss law expects: of this run first, then of the same run with other
            schedules. Empty without a law.

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
        update      %    epoch     samples  batch  accum.  learning rate
             0    0.0     0.00           0      8       1  1.000e-01
    """

    totals: dict[str, float]
    rows: tuple[PlanRow, ...]
    boundaries: tuple[Boundary, ...] = ()
    checkpoints: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    expected_losses: tuple[ExpectedLoss, ...] = ()

    @property
    def expected_loss(self) -> ExpectedLoss | None:
        """The expected loss of this run; None without a law."""
        return self.expected_losses[0] if self.expected_losses else None

    def __str__(self) -> str:
        lines = [f"{unit}: {_number(total)}" for unit, total in self.totals.items()]
        lines += [str(boundary) for boundary in self.boundaries]
        lines += [f"checkpoint: {line}" for line in self.checkpoints]
        if self.rows:
            rows = _spread(self.rows, 12)
            columns = [column for column in _COLUMNS if any(map(column.write, rows))]
            head = "  ".join(f"{column.name:>{column.width}}" for column in columns) + "  "
            groups = list(self.rows[0].learning_rates)
            if len(groups) > 1:
                lines += ["", " " * len(head) + "learning rate of the parameter group"]
                lines.append((head + "  ".join(f"{group:<9}" for group in groups)).rstrip())
            else:
                lines += ["", head + "learning rate" if groups else head.rstrip()]
            lines += [_line(row, columns) for row in rows]
        if self.expected_losses:
            lines += ["", *ranking(self.expected_losses)]
        if self.warnings:
            lines += ["", *(f"warning: {text}" for text in self.warnings)]
        return "\n".join(lines)

    def picture(self, path: str | Path) -> Path:
        """Draws learning rates and global batch size over the run, and writes a file.

        The horizontal axis counts updates, or percent of the budget if the updates are unknown.

        Args:
            path: File to write, such as ``"plan.png"`` or ``"plan.svg"``; the suffix selects the
                format.

        Returns:
            The path.

        Raises:
            ValueError: If the path is a folder or cannot be written, or matplotlib does not support
                the format.
        """
        # Imported late, because drawing is rare.
        from lightning_bigopt.reporting.loss_picture import plan_with_loss
        from lightning_bigopt.reporting.picture import new_picture, write_picture

        def draw() -> Any:
            if self.expected_loss is None:
                return new_picture(lambda axes: self._paint(axes[0]))
            return plan_with_loss(self._paint, self.expected_losses)

        return write_picture(draw, path, example="plan.png")

    def _paint(self, axis: Axes) -> int:
        """Draws learning rates and batch sizes; returns the rows of the legend below: none."""
        from lightning_bigopt.reporting.picture import short_label

        has_updates = all(row.update is not None for row in self.rows)
        xs = [_x_position(row) for row in self.rows]
        for group in self.rows[0].learning_rates if self.rows else ():
            axis.plot(
                xs, [row.learning_rates[group] for row in self.rows], label=short_label(group)
            )
        axis.set_xlabel("update" if has_updates else "fraction of the budget, %")
        axis.set_ylabel("learning rate")
        for boundary in self.boundaries:
            x = _x_position(boundary)
            axis.axvline(x, color="#a0aec0", linestyle=":", linewidth=1)
            axis.text(
                x,
                1.01,
                short_label(boundary.name),
                fontsize=7,
                ha="center",
                transform=axis.get_xaxis_transform(),
            )
        sizes = [row.global_batch_size for row in self.rows]
        if None not in sizes:
            right = axis.twinx()
            right.step(xs, sizes, where="post", color=_GRAY, linewidth=1)  # type: ignore[arg-type]
            right.set_ylabel("global batch, samples", color=_GRAY)
            right.set_ylim(bottom=0)
        axis.legend(fontsize=8, frameon=False, loc="lower center")
        return 0


def _x_position(item: PlanRow | Boundary) -> float:
    """Returns the update of a row or boundary, or its percentage of the budget."""
    return 100 * item.fraction if item.update is None else item.update


def _spread(rows: Sequence[PlanRow], count: int) -> list[PlanRow]:
    """Returns at most ``count`` rows, evenly spaced, including the first and the last."""
    if len(rows) <= count:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (count - 1))] for i in range(count)]


@dataclass(frozen=True)
class _Column:
    """A column of the printed table; a column without any value is not printed."""

    name: str
    width: int
    field: str
    form: str

    def write(self, row: PlanRow) -> str:
        value = getattr(row, self.field)
        return "" if value is None else format(value, self.form)


_COLUMNS = (
    _Column("update", 6, "update", "d"),
    _Column("%", 5, "percent", ".1f"),
    _Column("epoch", 7, "epoch", ".2f"),
    _Column("samples", 10, "samples", ",d"),
    _Column("tokens", 14, "tokens", ",d"),
    _Column("batch", 5, "global_batch_size", ",.0f"),
    _Column("accum.", 6, "accumulate", "d"),
)


def _line(row: PlanRow, columns: Sequence[_Column]) -> str:
    rates = [f"{rate:.3e}".ljust(len(name)) for name, rate in row.learning_rates.items()]
    return "  ".join([*(f"{c.write(row):>{c.width}}" for c in columns), *rates]).rstrip()


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:,.2f}"
