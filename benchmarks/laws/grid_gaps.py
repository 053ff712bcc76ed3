"""Measures how far the predictions of laws are from the best runs of grids."""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections.abc import Callable, Sequence
from statistics import fmean, median

import numpy as np
from scipy.interpolate import LinearNDInterpolator

from benchmarks.laws.grid_data import rows_of
from lightning_bigopt import HyperparameterLaw
from lightning_bigopt.planning.sweep_table import Grid

BAR = 0.15
"""Largest mean gap to the best grid point, in percent."""

SPLITS = 495
"""Largest number of splits into fitted and predicted grids; 12 grids have 495."""


def predicted(law: HyperparameterLaw, grid: Grid) -> tuple[float, float]:
    """Returns the logarithms of the learning rate and the batch that a law gives for a grid."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # predictions beyond the fitted grids are the point
        found = law.suggest(parameters=grid.parameters, tokens=grid.tokens)
    assert found.learning_rate is not None
    return math.log(found.learning_rate), math.log(found.batch_tokens)


def nearest_gap(law: HyperparameterLaw, grid: Grid) -> float:
    """Returns the gap, in percent, of the run nearest to the prediction to the best run."""
    rate, batch = predicted(law, grid)
    runs = zip(grid.learning_rates, grid.batches, grid.losses, strict=True)
    loss = min(runs, key=lambda run: math.hypot(math.log(run[0]) - rate, math.log(run[1]) - batch))[
        2
    ]
    return 100 * (loss / grid.best - 1)


def interpolated_gap(law: HyperparameterLaw, grid: Grid) -> float:
    """Returns the gap, in percent, of the loss interpolated at the prediction to the best run.

    It is NaN if the prediction is outside the runs.
    """
    points = [
        (math.log(rate), math.log(batch))
        for rate, batch in zip(grid.learning_rates, grid.batches, strict=True)
    ]
    loss = LinearNDInterpolator(points, grid.losses)(*predicted(law, grid))
    return 100 * (float(loss) / grid.best - 1)


def mean_gap(
    law: HyperparameterLaw,
    chosen: Sequence[Grid],
    gap: Callable[[HyperparameterLaw, Grid], float] = nearest_gap,
) -> float:
    """Returns the mean of the gaps to the best runs of grids, in percent."""
    return fmean(gap(law, grid) for grid in chosen)


def joint_law(chosen: Sequence[Grid], *, within: float = 0.01) -> HyperparameterLaw:
    """Fits the law of this package to grids."""
    return HyperparameterLaw.fit(rows_of(chosen), within=within)


def plain_law(chosen: Sequence[Grid]) -> HyperparameterLaw:
    """Fits a line through the logarithms of the best runs, for comparison."""
    best = [grid.losses.index(grid.best) for grid in chosen]
    scales = [[1.0, math.log(grid.parameters), math.log(grid.tokens)] for grid in chosen]
    rates = [math.log(g.learning_rates[i]) for g, i in zip(chosen, best, strict=True)]
    batches = [math.log(g.batches[i]) for g, i in zip(chosen, best, strict=True)]
    rate, batch = (np.linalg.lstsq(scales, each)[0].tolist() for each in (rates, batches))
    return HyperparameterLaw(
        name="plain",
        learning_rate=(math.exp(rate[0]), rate[1], rate[2]),
        batch_tokens=(math.exp(batch[0]), batch[1], batch[2]),
        parameters=(1.0, 1.0),
    )


def split_gaps(
    all_grids: Sequence[Grid],
    fitted: int,
    fit: Callable[[Sequence[Grid]], HyperparameterLaw] = joint_law,
) -> list[float]:
    """Returns the mean gap of each split into fitted and predicted grids, of at most SPLITS."""
    splits = list(itertools.combinations(range(len(all_grids)), fitted))
    if len(splits) > SPLITS:
        splits = random.Random(0).sample(splits, SPLITS)  # noqa: S311
    gaps = []
    for chosen in splits:
        law = fit([all_grids[index] for index in chosen])
        others = [grid for index, grid in enumerate(all_grids) if index not in chosen]
        gaps.append(mean_gap(law, others))
    return gaps


def split_figures(gaps: Sequence[float]) -> list[str]:
    """Returns mean, median, 90th percentile, largest, and the share within the bar."""
    ordered = sorted(gaps)
    figures = [fmean(gaps), median(gaps), ordered[int(0.9 * len(ordered))], ordered[-1]]
    within_bar = sum(gap <= BAR for gap in gaps) / len(gaps)
    return [*(f"{figure:.3f} %" for figure in figures), f"{within_bar:.0%}"]
