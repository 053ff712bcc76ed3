"""Fits one bowl of the loss to all grids, with its center on power laws."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_bigopt.planning.sweep_table import Grid

__all__ = ["fitted_laws"]

_FEWEST_BATCHES = 3
_SMALLEST_SPREAD = 0.02
"""Ratio of singular values below which parameters and tokens change together."""

_Law = tuple[float, float, float]


def fitted_laws(grids: Sequence[Grid], *, within: float) -> tuple[_Law, _Law]:
    """Fits the power laws of learning rate and batch, see :meth:`HyperparameterLaw.fit`.

    Args:
        grids: The grids.
        within: Runs up to this fraction above the best loss of their grid are fitted.

    Returns:
        Coefficient and exponents of parameters and tokens of the learning rate, and of the batch.

    Raises:
        ValueError: If the grids do not determine the laws.

    Warns:
        UserWarning: If there are only as many grids as coefficients.
    """
    scales, origin = _scales(grids)
    most = max(len(set(grid.batches)) for grid in grids)
    if most < _FEWEST_BATCHES:
        raise ValueError(
            f"table must be runs that determine a bowl, got {len(grids)} sweeps with at most "
            f"{most} different batch_tokens; each sweep needs at least three batches"
        )
    runs = [_runs(grid, within) for grid in grids]
    middle = np.vstack([points for points, _ in runs]).mean(axis=0)
    matrix = np.vstack(
        [_rows(points - middle, scales[g], g, len(grids)) for g, (points, _) in enumerate(runs)]
    )
    target = np.concatenate([losses for _, losses in runs])
    solution, _, rank, _ = np.linalg.lstsq(matrix, target, rcond=None)
    if rank < matrix.shape[1]:
        raise ValueError(
            f"table must be runs that determine a bowl, got {len(target)} runs within {within:.2%} "
            f"of the best losses for {matrix.shape[1]} unknowns; add learning rates and batches "
            f"near the best ones, or increase within"
        )
    square_rate, product, square_batch, *slopes = solution[len(grids) :]
    curvature = np.array([[2 * square_rate, product], [product, 2 * square_batch]])
    if np.linalg.eigvalsh(curvature)[0] <= 0.0:
        raise ValueError(
            f"table must be runs whose losses have a minimum in learning rate and batch, got "
            f"losses without one within {within:.2%} of the best; widen the grids, or increase "
            f"within"
        )
    centers = np.linalg.solve(curvature, -np.reshape(slopes, (2, scales.shape[1])))
    return _law(centers[0], middle[0], origin), _law(centers[1], middle[1], origin)


def _scales(grids: Sequence[Grid]) -> tuple[Any, list[float | None]]:
    """Returns 1 and the centered logarithms that vary, a row for each grid, and their means."""
    columns, origin = [np.ones(len(grids))], list[float | None]()
    for values in ([grid.parameters for grid in grids], [grid.tokens for grid in grids]):
        logs = np.log(values)
        varies = bool(np.ptp(logs) > 1e-6)
        origin.append(float(logs.mean()) if varies else None)
        if varies:
            columns.append(logs - logs.mean())
    scales = np.stack(columns, axis=1)
    number = scales.shape[1]
    if number == 1 or len(grids) < number:
        raise ValueError(
            f"table must be at least {max(number, 2)} sweeps with different parameters or tokens, "
            f"got {len(grids)}; add sweeps"
        )
    spread = np.linalg.svd(scales / np.linalg.norm(scales, axis=0), compute_uv=False)
    if spread[-1] < _SMALLEST_SPREAD * spread[0]:
        raise ValueError(
            "table must be sweeps in which parameters and tokens change independently, got tokens "
            "that follow from the parameters; add a sweep with another ratio"
        )
    if len(grids) == number:
        warnings.warn(
            f"{len(grids)} sweeps determine {number} coefficients exactly, noise included; add a "
            f"sweep.",
            UserWarning,
            stacklevel=4,
        )
    return scales, origin


def _runs(grid: Grid, within: float) -> tuple[Any, Any]:
    """Returns log learning rate and log batch of the runs near the best, and their log losses."""
    points = np.log(np.stack([grid.learning_rates, grid.batches], axis=1))
    excess = np.log(np.array(grid.losses) / grid.best)
    near = excess <= np.log1p(within)
    return points[near], excess[near]


def _rows(points: Any, scale: Any, grid: int, grids: int) -> Any:
    """Returns the rows of the least-squares problem for the runs of one grid."""
    rate, batch = points[:, :1], points[:, 1:]
    own = np.zeros((len(points), grids))
    own[:, grid] = 1.0
    squares = [rate * rate, rate * batch, batch * batch]
    return np.hstack([own, *squares, rate * scale, batch * scale])


def _law(center: Any, middle: float, origin: Sequence[float | None]) -> _Law:
    """Returns coefficient and exponents of a center that is linear in the centered logarithms."""
    constant, *slopes = [float(value) for value in center]
    exponents = [0.0 if mean is None else slopes.pop(0) for mean in origin]
    shift = sum(e * (mean or 0.0) for e, mean in zip(exponents, origin, strict=True))
    return (float(np.exp(constant + middle - shift)), exponents[0], exponents[1])
