"""Reads grids of runs from a CSV file, or generates them from a law."""

from __future__ import annotations

import csv
import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path

from lightning_bigopt.planning.sweep_table import COLUMNS, Grid

# The law of the generated grids: coefficient, exponents of parameters and tokens.
GENERATED_RATE = (20.0, -0.8, 0.25)
GENERATED_BATCH = (4.0, 0.0, 0.5)
NOISE = 5e-4  # standard deviation of the logarithm of a loss


def read_rows(path: Path) -> list[dict[str, float]]:
    """Reads the columns of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not set(COLUMNS) <= set(rows[0]):
        raise SystemExit(f"{path} must have the columns {', '.join(COLUMNS)} and rows")
    return [{name: float(row[name]) for name in COLUMNS} for row in rows]


def generated_rows(seed: int, models: Sequence[float]) -> list[dict[str, float]]:
    """Generates grids of runs from the law, with a bowl that is steeper at high learning rates."""
    generator = random.Random(seed)  # noqa: S311 - reproducible noise
    rows = []
    for parameters, ratio in itertools.product(models, (20, 50, 100)):
        tokens = parameters * ratio
        center = [
            math.log(c * parameters**a * tokens**b) for c, a, b in (GENERATED_RATE, GENERATED_BATCH)
        ]
        floor = 1.7 + 400 / parameters**0.34 + 400 / tokens**0.28
        for i, j in itertools.product(range(-8, 4), range(-4, 6)):
            rate = 2.0 ** (round(2 * center[0] / math.log(2)) / 2 + i / 2)
            batch = 2.0 ** (round(2 * center[1] / math.log(2)) / 2 + j / 2)
            x, y = math.log(rate) - center[0], math.log(batch) - center[1]
            excess = 0.01 * x * x - 0.008 * x * y + 0.01 * y * y + 0.004 * max(x, 0.0) ** 3
            loss = floor * math.exp(excess + generator.gauss(0.0, NOISE))
            rows.append(dict(zip(COLUMNS, (parameters, tokens, rate, batch, loss), strict=True)))
    return rows


def rows_of(grid_list: Sequence[Grid]) -> list[dict[str, float]]:
    """Returns the rows of grids."""
    return [
        dict(zip(COLUMNS, (grid.parameters, grid.tokens, *run), strict=True))
        for grid in grid_list
        for run in zip(grid.learning_rates, grid.batches, grid.losses, strict=True)
    ]
