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


_GRAY = "#718096"  # no color of a learning rate's


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One update of the plan, or one share of a budget whose updates are not known.

    Args:
        update: Its number, from 0; None where unknown.
        fraction: The share of the budget spent before it.
        epoch: Passes over the data before it; None for a loader without length.
        samples: Samples over all processes before it; None where unknown.
        tokens: Tokens before it; None where unknown.
        learning_rates: By parameter group.
        global_batch_size: Samples in it over all processes; None where unknown.
        accumulate: Its micro-batches of one process; None where unknown.
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
        """The share of the budget in percent."""
        return 100 * self.fraction


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """Where a stage of a schedule begins or ends.

    Args:
        name: Such as ``"warmup ends"``.
        update: The first update behind it; None where updates are not known in advance.
        fraction: The share of the budget at which it lies.
    """

    name: str
    update: int | None
    fraction: float

    def __str__(self) -> str:
        at = f"{100 * self.fraction:.1f} %" if self.update is None else f"update {self.update:,}"
        return f"{self.name}: {at}"


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
        lines += [str(stage) for stage in self.boundaries]
        lines += [f"checkpoint: {line}" for line in self.checkpoints]
        if self.rows:
            rows = _few(self.rows, 12)
            columns = [column for column in _COLUMNS if any(map(column.write, rows))]
            head = [f"{column.name:>{column.width}}" for column in columns]
            head += [f"{group:<9}" for group in self.rows[0].learning_rates]
            lines += ["", "  ".join(head).rstrip(), *(_line(row, columns) for row in rows)]
        if self.warnings:
            lines += ["", *(f"warning: {text}" for text in self.warnings)]
        return "\n".join(lines)

    def picture(self, path: str | Path) -> Path:
        """Draws learning rates and batch; the suffix chooses the format.

        They are drawn over the updates, or over the share of the budget where these are not known.

        Args:
            path: Such as ``"plan.png"`` or ``"plan.svg"``.

        Returns:
            The path.

        Raises:
            ValueError: If it is a folder, or of a format that matplotlib does not write.
        """
        target = Path(path)
        if target.is_dir():
            raise ValueError(
                f"path must be the name of a file, got the folder {str(target)!r}; write "
                f"{str(target / 'plan.png')!r}"
            )
        figure = new_picture(lambda axes: self._paint(axes[0]))
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=120)
        return target

    def _paint(self, axis: Axes) -> None:
        counted = all(row.update is not None for row in self.rows)
        places = [_place(row) for row in self.rows]
        for group in self.rows[0].learning_rates if self.rows else ():
            axis.plot(places, [row.learning_rates[group] for row in self.rows], label=group)
        axis.set_xlabel("update" if counted else "share of the budget, %")
        axis.set_ylabel("learning rate")
        for stage in self.boundaries:
            at = _place(stage)
            axis.axvline(at, color="#a0aec0", linestyle=":", linewidth=1)
            axis.text(
                at,
                1.01,
                stage.name,
                fontsize=7,
                ha="center",
                transform=axis.get_xaxis_transform(),
            )
        sizes = [row.global_batch_size for row in self.rows]
        if None not in sizes:
            beside = axis.twinx()
            beside.step(places, sizes, where="post", color=_GRAY, linewidth=1)  # type: ignore[arg-type]
            beside.set_ylabel("global batch, samples", color=_GRAY)
            beside.set_ylim(bottom=0)
        axis.legend(fontsize=8, frameon=False, loc="lower center")


def _place(item: PlanRow | Boundary) -> float:
    """Where it is drawn: at its update, or at its share in percent."""
    return 100 * item.fraction if item.update is None else item.update


def _few(rows: Sequence[PlanRow], count: int) -> list[PlanRow]:
    if len(rows) <= count:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (count - 1))] for i in range(count)]


@dataclass(frozen=True)
class _Column:
    """A column of the table, left out where nothing is known of it."""

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
    rates = [f"{rate:.3e}" for rate in row.learning_rates.values()]
    return "  ".join([*(f"{c.write(row):>{c.width}}" for c in columns), *rates])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:,.2f}"
