"""Reads a table of runs, and groups them into grids of learning rate and batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lightning_bigopt.checks import check_positive, shown

__all__ = ["COLUMNS", "Grid", "grids_of"]

COLUMNS = ("parameters", "tokens", "learning_rate", "batch_tokens", "loss")
"""The columns of a table of runs."""
_SAME_TOKENS = 1.02
"""Factor up to which runs with other tokens are of the same grid."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The runs of one number of parameters and tokens.

    Args:
        parameters: Parameters of the model.
        tokens: Tokens of a run, on average.
        learning_rates: Learning rate of each run.
        batches: Global batch of each run, in tokens.
        losses: Loss of each run.
    """

    parameters: float
    tokens: float
    learning_rates: tuple[float, ...]
    batches: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def best(self) -> float:
        """The lowest loss."""
        return min(self.losses)

    @property
    def text(self) -> str:
        """Parameters and tokens, for messages."""
        return f"{self.parameters:.3g} parameters and {self.tokens:.3g} tokens"

    def edge(self) -> str:
        """Returns the edge of the grid at which the best run is, in words; empty if at none."""
        index = self.losses.index(self.best)
        for what, values in (("learning rate", self.learning_rates), ("batch", self.batches)):
            if values[index] == min(values):
                return f"lowest {what}"
            if values[index] == max(values):
                return f"highest {what}"
        return ""


def grids_of(table: Any) -> list[Grid]:
    """Groups the rows of a table by parameters and tokens.

    Whole updates make the tokens of a sweep differ a little between its batches: tokens up to 2 %
    above the smallest ones are the same grid, which has their mean.

    Args:
        table: Mappings, as of ``csv.DictReader``, or a mapping of columns, with :data:`COLUMNS`.
            Texts of numbers count as numbers.

    Returns:
        The grids, with ascending compute (parameters times tokens).

    Raises:
        ValueError: If the table is empty, lacks a column, or has a value that is not positive and
            finite.

    Example:
        >>> row = dict(parameters=1e6, tokens=1e8, learning_rate=1e-3, batch_tokens=1e4, loss=3.0)
        >>> grids_of([row, {**row, "loss": 2.9}])[0].losses
        (3.0, 2.9)
    """
    groups: list[list[tuple[float, ...]]] = []
    for row in sorted(_rows(table), key=lambda row: row[:2]):
        first = groups[-1][0] if groups else row
        is_same = row[0] == first[0] and row[1] <= first[1] * _SAME_TOKENS
        if groups and is_same:
            groups[-1].append(row)
        else:
            groups.append([row])
    return sorted(map(_grid, groups), key=lambda grid: grid.parameters * grid.tokens)


def _grid(rows: Sequence[tuple[float, ...]]) -> Grid:
    parameters, tokens, rates, batches, losses = zip(*rows, strict=True)
    return Grid(
        parameters=parameters[0],
        tokens=fmean(tokens),
        learning_rates=rates,
        batches=batches,
        losses=losses,
    )


def _rows(table: Any) -> list[tuple[float, ...]]:
    """Returns the checked values of the columns, a tuple for each row."""
    if isinstance(table, Mapping) or (hasattr(table, "keys") and hasattr(table, "__getitem__")):
        _check_columns("table", table)
        columns = [list(table[name]) for name in COLUMNS]
        if len({len(column) for column in columns}) > 1:
            lengths = ", ".join(f"{n} {len(c)}" for n, c in zip(COLUMNS, columns, strict=True))
            raise ValueError(
                f"table must be columns of the same length, got {lengths}; add the missing values"
            )
        rows = list(zip(*columns, strict=True))
    elif isinstance(table, Iterable) and not isinstance(table, (str, bytes)):
        listed = list(table)
        for index, row in enumerate(listed):
            if not isinstance(row, Mapping):
                raise ValueError(
                    f"table[{index}] must be a mapping of column names to values, got "
                    f"{shown(row)}; write a dict with {', '.join(COLUMNS)}"
                )
            _check_columns(f"table[{index}]", row)
        rows = [tuple(row[name] for name in COLUMNS) for row in listed]
    else:
        raise ValueError(
            f"table must be a list of rows or a mapping of columns, got {shown(table)}; "
            f"write a list of dicts with {', '.join(COLUMNS)}"
        )
    if not rows:
        raise ValueError("table must be a list of runs, got no rows; add the runs of your sweeps")
    rows = [tuple(map(_number, row)) for row in rows]
    for index, row in enumerate(rows):
        for name, value in zip(COLUMNS, row, strict=True):
            hint = "leave out the rows of runs that diverged" if name == "loss" else ""
            check_positive(f"{name} of row {index}", value, hint=hint or "write a number")
    return [tuple(map(float, row)) for row in rows]


def _number(value: Any) -> Any:
    """Returns the number in a text; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _check_columns(name: str, row: Any) -> None:
    missing = [column for column in COLUMNS if column not in row]
    if missing:
        raise ValueError(
            f"{name} must be a table with the columns {', '.join(COLUMNS)}, got none named "
            f"{', '.join(missing)}; rename or add the columns"
        )
