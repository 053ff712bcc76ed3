"""Short branches with other learning rates, each with a warm-up and a cooldown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, pstdev

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lightning_bigopt.schedules.shapes import COOLDOWNS
from lightning_bigopt.tuning.base_rates import BaseRates
from lightning_bigopt.tuning.branches import Branch, run_branch
from lightning_bigopt.tuning.curve import RangeTest
from lightning_bigopt.tuning.log_rate_fit import is_significantly_lower

__all__ = [
    "FollowRate",
    "branch_factor",
    "highest_useful_rate",
    "initial_losses",
    "next_step",
    "run_rate_branches",
    "scores",
]

WARMUP = 0.1
COOLDOWN = 0.2
SCORED = 0.2
"""Shares of a branch: the warm-up, the cooldown, and the last updates whose losses are its score.

The scored losses are computed during the cooldown, on batches that no update has used yet.
"""

RATIO = 2.5
"""Ratio of neighboring learning rates; five branches span a factor of 39."""


def branch_factor(fraction: float) -> float:
    """Returns the factor on the learning rate at a fraction of a branch.

    Args:
        fraction: Fraction of the branch in the middle of the update, so that no update has the
            factor 0.

    Example:
        >>> [round(branch_factor(fraction), 2) for fraction in (0.05, 0.5, 0.9, 0.99)]
        [0.5, 1.0, 0.29, 0.03]
    """
    if fraction < WARMUP:
        return fraction / WARMUP
    if fraction <= 1.0 - COOLDOWN:
        return 1.0
    return COOLDOWNS["1-sqrt"]((fraction - 1.0 + COOLDOWN) / COOLDOWN)


class FollowRate(Callback):
    """Writes the learning rates of a branch: a peak times :func:`branch_factor`.

    Args:
        groups: Writes the learning rates.
        peak: Highest learning rate of the reference group.
        updates: Length of the branch.
    """

    def __init__(self, groups: BaseRates, *, peak: float, updates: int) -> None:
        self.groups, self.peak, self.updates = groups, peak, updates

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Writes the learning rates of the update."""
        fraction = (trainer.global_step + 0.5) / self.updates
        self.groups.write(self.peak * branch_factor(min(fraction, 1.0)))


def run_rate_branches(
    trainer: Trainer,
    module: LightningModule,
    groups: BaseRates,
    *,
    callbacks: Callable[[], Sequence[Callback]],
    start: float,
    count: int,
    updates: int,
) -> dict[float, Branch]:
    """Runs branches on a grid of learning rates that grows toward the lower loss.

    The first two branches have the learning rates ``start`` and ``start / RATIO``; see
    :func:`next_step` for the others.

    Args:
        trainer: The Trainer, from ``on_fit_start`` on.
        module: The module.
        groups: Writes the learning rates.
        callbacks: Returns new callbacks that take part in a branch.
        start: Learning rate of the first branch.
        count: Number of branches.
        updates: Updates of one branch.

    Returns:
        The branches by learning rate, ascending.
    """
    found: dict[int, Branch] = {}
    for _ in range(count):
        step = next_step(found)
        peak = start * RATIO**step
        found[step] = run_branch(
            trainer,
            module,
            callbacks=[*callbacks(), FollowRate(groups, peak=peak, updates=updates)],
            max_steps=updates,
        )
    return {start * RATIO**step: found[step] for step in sorted(found)}


def next_step(found: Mapping[int, Branch]) -> int:
    """Returns the next step of a grid of learning rates, on which branches search the lowest loss.

    The grid grows at the end with the lower loss. It has no gaps: they would shift the weighted
    center of the branches. After two branches it grows upward unless the lower learning rate is
    significantly better: branches that have learned nothing yet differ by noise only.

    Args:
        found: The branches by step.

    Returns:
        The step; 0 for the first branch, -1 for the second.
    """
    if len(found) < 2:
        return -len(found)
    low, high = min(found), max(found)
    if len(found) == 2:
        grows_down = _is_better(found[low], found[high])
    else:
        grows_down = _score(found[low]) < _score(found[high])
    return low - 1 if grows_down else high + 1


def scores(branch: Branch) -> tuple[float, ...]:
    """Returns the losses of the last updates of a branch; empty if it diverged.

    Example:
        >>> scores(Branch(losses=(9.0,) * 16 + (4.0, 3.0, 2.0, 1.0), evaluation=(), diverged=False))
        (4.0, 3.0, 2.0, 1.0)
    """
    count = max(1, round(SCORED * len(branch.losses)))
    return () if branch.diverged else branch.losses[-count:]


def _score(branch: Branch) -> float:
    return math.inf if branch.diverged else fmean(scores(branch))


def _is_better(branch: Branch, other: Branch) -> bool:
    """Returns whether the loss of a branch is significantly below that of another."""
    if branch.diverged or other.diverged:
        return other.diverged
    return is_significantly_lower(scores(branch), scores(other))


def highest_useful_rate(sweep: RangeTest) -> float:
    """Returns the highest learning rate of a sweep at which the loss is not above its start.

    The loss is averaged over three neighboring learning rates, and may be three standard deviations
    of its :func:`initial_losses` higher than their mean.

    Args:
        sweep: The range test.

    Example:
        >>> losses = (2.0, 2.0, 2.0, 1.9, 1.8, 1.7, 2.1, 4.2, 9.0)
        >>> rates = tuple(10.0**power for power in range(-9, 0))
        >>> highest_useful_rate(RangeTest(learning_rates=rates, losses=losses, skip=0))
        0.0001
    """
    losses, start = sweep.losses, initial_losses(sweep)
    limit = fmean(start) + 3.0 * pstdev(start)
    averages = [fmean(losses[max(0, i - 1) : i + 2]) for i in range(len(losses))]
    useful = [
        rate for rate, loss in zip(sweep.learning_rates, averages, strict=True) if loss <= limit
    ]
    return max(useful, default=sweep.learning_rates[0])


def initial_losses(sweep: RangeTest) -> tuple[float, ...]:
    """Returns the losses of the first third of a sweep, in which nothing is learned yet.

    Example:
        >>> rates = tuple(10.0**power for power in range(-9, 0))
        >>> losses = (2.0, 2.1, 1.9, 1.8, 1.7, 1.6, 1.6, 1.9, 9.0)
        >>> initial_losses(RangeTest(learning_rates=rates, losses=losses, skip=0))
        (2.0, 2.1, 1.9)
    """
    return sweep.losses[: max(3, len(sweep.losses) // 3)]
