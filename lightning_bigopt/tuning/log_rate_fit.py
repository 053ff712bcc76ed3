"""Fits a parabola in the logarithm of the learning rate to the losses of short branches."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

__all__ = ["Minimum", "least_squares_minimum", "minimum_of", "relative_errors"]

SOFTNESS = 0.1
"""Loss above the best, as a share of the best branch's gain, at which a branch has half weight.

Losses are close to a parabola only near their minimum: far below it a branch learns nothing, far
above it diverges.
"""

RESAMPLES = 200
"""Number of resamplings; enough for a standard deviation within 5 % of itself."""


@dataclass(frozen=True, kw_only=True)
class Minimum:
    """The minimum of a fit.

    Args:
        learning_rate: The learning rate at the minimum, within those tried.
        deviation: Standard deviation of its logarithm, from the choice of the batches.
        edge: ``"low"`` or ``"high"`` if the lowest or highest learning rate tried was the best, and
            the minimum may be beyond it; None otherwise.
    """

    learning_rate: float
    deviation: float
    edge: str | None


def minimum_of(
    learning_rates: Sequence[float], losses: Sequence[Sequence[float]], *, initial: float
) -> Minimum:
    """Fits the minimum, and resamples the batches for its uncertainty.

    Branches that diverged, or end above the initial loss, count as having the initial loss.

    Args:
        learning_rates: At least three learning rates, ascending.
        losses: For each learning rate its losses on the same batches; empty if it diverged.
        initial: The loss before the first update.

    Returns:
        The minimum.

    Example:
        >>> rates = [1e-3, 3e-3, 9e-3, 27e-3]
        >>> losses = [[2 + 0.1 * math.log(rate / 5e-3) ** 2 + noise] for rate in rates
        ...     for noise in (0.0,)]
        >>> found = minimum_of(rates, losses, initial=5.0)
        >>> round(found.learning_rate, 6), found.edge
        (0.005, None)
    """
    logs = [math.log(rate) for rate in learning_rates]
    batches = max(map(len, losses))
    table = [[_capped(loss, initial) for loss in each] or [initial] * batches for each in losses]
    means = [fmean(each) for each in table]
    best = min(range(len(means)), key=means.__getitem__)
    found = least_squares_minimum(logs, means, initial=initial)
    generator = random.Random(0)  # noqa: S311 - the same result on every process
    resampled = []
    for _ in range(RESAMPLES):
        chosen = [generator.randrange(batches) for _ in range(batches)]
        again = [fmean(each[index] for index in chosen) for each in table]
        resampled.append(least_squares_minimum(logs, again, initial=initial))
    edge = "low" if best == 0 else "high" if best == len(means) - 1 else None
    return Minimum(learning_rate=math.exp(found), deviation=pstdev(resampled), edge=edge)


def least_squares_minimum(
    positions: Sequence[float], losses: Sequence[float], *, initial: float
) -> float:
    r"""Returns the position of the minimum of a parabola fitted by weighted least squares.

    A loss that is :math:`d` above the smallest loss :math:`l` has the weight
    :math:`1 / (1 + (d / s)^2)`, where :math:`s` is :data:`SOFTNESS` of the gain
    :math:`initial - l`.

    Args:
        positions: At least three different positions.
        losses: The loss at each position.
        initial: The loss before training.

    Returns:
        The minimum, within the positions; the best position if the fit has no minimum.

    Example:
        >>> least_squares_minimum([0.0, 1.0, 2.0, 3.0], [4.0, 1.0, 0.0, 1.0], initial=9.0)
        2.0
    """
    lowest = min(losses)
    best = positions[losses.index(lowest)]
    softness = SOFTNESS * (initial - lowest)
    if softness <= 0.0:
        return best
    weights = [1 / (1 + ((loss - lowest) / softness) ** 2) for loss in losses]
    # Centered at the best position, so that the normal equations are well-conditioned.
    shifted = [position - best for position in positions]
    moments = [
        sum(w * x**power for w, x in zip(weights, shifted, strict=True)) for power in range(5)
    ]
    rights = [
        sum(w * x**power * y for w, x, y in zip(weights, shifted, losses, strict=True))
        for power in range(3)
    ]
    _, slope, curvature = _solve([moments[i : i + 3] for i in range(3)], rights)
    if curvature <= 0.0:
        return best
    return min(max(best - slope / (2 * curvature), positions[0]), positions[-1])


def relative_errors(losses: Sequence[Sequence[float]], best: int) -> tuple[float, ...]:
    """Returns the standard error of each branch's difference to the best, paired by batch.

    Args:
        losses: For each branch its losses on the same batches; empty if it diverged.
        best: Index of the best branch.

    Returns:
        The standard errors; 0 for the best branch, NaN for a diverged one or a single batch.
    """
    found = []
    for each in losses:
        differences = [a - b for a, b in zip(each, losses[best], strict=False)]
        count = len(differences)
        error = pstdev(differences) / math.sqrt(count - 1) if count > 1 else math.nan
        found.append(error)
    return tuple(found)


def _capped(loss: float, initial: float) -> float:
    return min(loss, initial) if math.isfinite(loss) else initial


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Solves three linear equations by elimination with pivots."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for column in range(3):
        pivot = max(range(column, 3), key=lambda r: abs(rows[r][column]))
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for other in range(3):
            if other != column:
                factor = rows[other][column] / rows[column][column]
                rows[other] = [
                    a - factor * b for a, b in zip(rows[other], rows[column], strict=True)
                ]
    return [rows[i][3] / rows[i][i] for i in range(3)]
