"""Reads a table of runs, and groups them into grids of learning rate and batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_bigopt.checks import check_positive, shown

__all__ = ["COLUMNS", "Grid", "grids_of"]

COLUMNS = ("parameters", "tokens", "learning_rate", "batch_tokens", "loss")
"""The columns of a table of runs."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The runs of one number of parameters and tokens.

    Args:
        parameters: Parameters of the model.
        tokens: Tokens of each run.
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

    Args:
        table: A sequence of mappings, or a mapping of columns, with :data:`COLUMNS`.

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
    groups: dict[tuple[float, float], list[tuple[float, ...]]] = {}
    for parameters, tokens, *run in _rows(table):
        groups.setdefault((parameters, tokens), []).append(tuple(run))
    grids = []
    for (parameters, tokens), runs in sorted(groups.items(), key=lambda item: _compute(item[0])):
        rates, batches, losses = zip(*runs, strict=True)
        grids.append(
            Grid(
                parameters=parameters,
                tokens=tokens,
                learning_rates=rates,
                batches=batches,
                losses=losses,
            )
        )
    return grids


def _compute(pair: tuple[float, float]) -> tuple[float, float]:
    return pair[0] * pair[1], pair[0]


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
    elif isinstance(table, Sequence) and not isinstance(table, str):
        for index, row in enumerate(table):
            if not isinstance(row, Mapping):
                raise ValueError(
                    f"table[{index}] must be a mapping of column names to values, got "
                    f"{shown(row)}; write a dict with {', '.join(COLUMNS)}"
                )
            _check_columns(f"table[{index}]", row)
        rows = [tuple(row[name] for name in COLUMNS) for row in table]
    else:
        raise ValueError(
            f"table must be a list of rows or a mapping of columns, got {shown(table)}; "
            f"write a list of dicts with {', '.join(COLUMNS)}"
        )
    if not rows:
        raise ValueError("table must be a list of runs, got no rows; add the runs of your sweeps")
    for index, row in enumerate(rows):
        for name, value in zip(COLUMNS, row, strict=True):
            hint = "leave out the rows of runs that diverged" if name == "loss" else ""
            check_positive(f"{name} of row {index}", value, hint=hint or "write a number")
    return [tuple(map(float, row)) for row in rows]


def _check_columns(name: str, row: Any) -> None:
    missing = [column for column in COLUMNS if column not in row]
    if missing:
        raise ValueError(
            f"{name} must be a table with the columns {', '.join(COLUMNS)}, got none named "
            f"{', '.join(missing)}; rename or add the columns"
        )
