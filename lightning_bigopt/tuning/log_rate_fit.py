"""Fits the best learning rate to the losses of short branches, in the logarithm of the rate."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

__all__ = [
    "Optimum",
    "is_significantly_lower",
    "optimum_of",
    "paired_errors",
    "weighted_center",
]

SOFTNESS = 0.05
"""Loss above the best, as a share of the gain of the best branch, at which a branch has weight 1/2.

The loss over the logarithm of the learning rate has a flat bottom of about a factor of ten, on
which the losses of short branches are noisy. With this share the weights cover the bottom.
"""

SIGNIFICANT = 2.0
"""Paired standard errors by which the losses of two branches differ significantly."""

RESAMPLES = 200
"""Number of resamplings; the standard deviation of their results has an error of 5 %."""


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best learning rate of branches.

    Args:
        learning_rate: The learning rate, within those tried.
        deviation: Standard deviation of its logarithm, from the choice of the batches.
        edge: ``"low"`` or ``"high"`` if the lowest or highest learning rate tried was significantly
            better than the next one, so that the optimum may be beyond it; None otherwise.
    """

    learning_rate: float
    deviation: float
    edge: str | None


def optimum_of(
    learning_rates: Sequence[float], losses: Sequence[Sequence[float]], *, initial: float
) -> Optimum:
    """Fits the best learning rate, and resamples the batches for its uncertainty.

    Args:
        learning_rates: At least two learning rates, ascending.
        losses: For each learning rate its losses on the same batches; empty if it diverged.
        initial: The loss before the first update; a branch that ended higher has the weight of it.

    Returns:
        The optimum.

    Example:
        >>> found = optimum_of([1e-3, 1e-2, 1e-1], [[3.0], [2.0], [3.0]], initial=5.0)
        >>> round(found.learning_rate, 6), found.deviation, found.edge
        (0.01, 0.0, None)
    """
    logs = [math.log(rate) for rate in learning_rates]
    batches = max(map(len, losses))
    highest = max(initial, *(fmean(each) for each in losses if each))
    table = [list(each) or [highest] * batches for each in losses]
    means = [fmean(each) for each in table]
    best = min(range(len(means)), key=means.__getitem__)
    generator = random.Random(0)  # noqa: S311 - every process resamples alike
    resampled = []
    for _ in range(RESAMPLES):
        chosen = [generator.randrange(batches) for _ in range(batches)]
        again = [fmean(each[index] for index in chosen) for each in table]
        resampled.append(weighted_center(logs, again, initial=initial))
    return Optimum(
        learning_rate=math.exp(weighted_center(logs, means, initial=initial)),
        deviation=pstdev(resampled),
        edge=_edge(table, best),
    )


def _edge(losses: Sequence[Sequence[float]], best: int) -> str | None:
    """Returns the end of the grid at which the best branch is, if it beats the next one there."""
    if best not in {0, len(losses) - 1}:
        return None
    following = 1 if best == 0 else best - 1
    if not is_significantly_lower(losses[best], losses[following]):
        return None
    return "low" if best == 0 else "high"


def is_significantly_lower(losses: Sequence[float], others: Sequence[float]) -> bool:
    """Returns whether the mean of losses is below that of others on the same batches.

    Example:
        >>> is_significantly_lower([1.0, 2.0, 3.0], [2.0, 3.0, 4.5])
        True
        >>> is_significantly_lower([1.0, 2.0, 3.0], [2.0, 1.0, 3.5])
        False
    """
    _, error = paired_errors([losses, others], 0)
    margin = 0.0 if math.isnan(error) else SIGNIFICANT * error  # one batch has no error
    return fmean(losses) < fmean(others) - margin


def weighted_center(
    positions: Sequence[float], losses: Sequence[float], *, initial: float
) -> float:
    r"""Returns the mean of positions, weighted by how close their losses are to the smallest one.

    A loss that is :math:`d` above the smallest loss :math:`l` has the weight
    :math:`1 / (1 + (d / s)^2)`, where :math:`s` is :data:`SOFTNESS` times the gain
    :math:`initial - l`, and :math:`d` is at most the gain. The mean uses all branches at the bottom
    of the basin, and is less noisy than the minimum of a parabola; a steep side of the basin does
    not shift it.

    Args:
        positions: The positions.
        losses: The loss at each position.
        initial: The loss before training.

    Returns:
        The weighted mean; the position of the smallest loss if no loss is below ``initial``.

    Example:
        >>> weighted_center([0.0, 1.0, 2.0], [3.0, 1.0, 3.0], initial=5.0)
        1.0
        >>> round(weighted_center([0.0, 1.0, 2.0], [1.4, 1.0, 9.0], initial=5.0), 2)
        0.84
    """
    lowest = min(losses)
    softness = SOFTNESS * (initial - lowest)
    if softness <= 0.0:
        return positions[losses.index(lowest)]
    weights = [1.0 / (1.0 + ((min(loss, initial) - lowest) / softness) ** 2) for loss in losses]
    products = (weight * position for weight, position in zip(weights, positions, strict=True))
    return sum(products) / sum(weights)


def paired_errors(losses: Sequence[Sequence[float]], reference: int) -> tuple[float, ...]:
    """Returns the standard error of the difference of each mean loss to that of a reference.

    Args:
        losses: For each branch its losses on the same batches; empty if it diverged.
        reference: Index of the branch to compare with.

    Returns:
        The standard errors; 0 for the reference, NaN for a diverged branch or a single batch.

    Example:
        >>> paired_errors([[1.0, 2.0, 3.0], [2.0, 2.0, 5.0], []], 0)
        (0.0, 0.577..., nan)
    """
    found = []
    for each in losses:
        differences = [a - b for a, b in zip(each, losses[reference], strict=False)]
        count = len(differences)
        found.append(pstdev(differences) / math.sqrt(count - 1) if count > 1 else math.nan)
    return tuple(found)
