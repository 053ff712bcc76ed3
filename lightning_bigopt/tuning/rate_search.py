"""The search of find_learning_rate: a range test, branches, and the fit of their losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_bigopt.optimizers.private import check_not_private
from lightning_bigopt.trainer_access import callbacks as trainer_callbacks
from lightning_bigopt.trainer_access import trial_runs
from lightning_bigopt.tuning.base_rates import BaseRates
from lightning_bigopt.tuning.curve import exponential_rates
from lightning_bigopt.tuning.found_learning_rate import FoundLearningRate
from lightning_bigopt.tuning.log_rate_fit import SIGNIFICANT, optimum_of, paired_errors
from lightning_bigopt.tuning.rate_branches import (
    highest_useful_rate,
    initial_losses,
    run_rate_branches,
    scores,
)
from lightning_bigopt.tuning.sweep import Sweep, run_sweep

__all__ = ["LEAST_BRANCH", "LEAST_SWEEP", "RateSearch"]

SWEEP = 0.12
"""Share of the budget that the range test may use; it places the branches within a factor of 10."""

BELOW_RISE = 9.0
"""Divides the highest learning rate at which the loss does not rise in the sweep, for the first
branch. A branch was best at 1/4 to 1/25 of it, with Adam and SGD."""

LEAST_SWEEP, LEAST_BRANCH = 12, 10
"""Updates below which a sweep of seven decades, or a branch with warm-up and cooldown, is noise."""

EXPONENT_DEVIATION, BRANCH_DEVIATION = 0.15, 0.25
"""Standard deviations of the exponent between tasks, and of the logarithm of the best learning rate
of branches between initial weights, for the interval of the suggestion."""


class RateSearch(Callback):
    """Searches a learning rate when a fit starts, and ends the fit.

    Args:
        run_updates: Updates of the whole run.
        budget: Updates of range test and branches together.
        branches: Number of branches.
        start: Learning rate of the first branch; None for that of the range test.
        exponent: Exponent of the ratio of the lengths of branch and run.
        uses_result: Whether the module gets the suggestion.
        trainer_callbacks: The callbacks of the Trainer, which the fit replaces.
        copies: Returns new copies of the callbacks that take part in a branch.

    Attributes:
        found: The result; None before the fit.
    """

    def __init__(
        self,
        *,
        run_updates: int,
        budget: int,
        branches: int,
        start: float | None,
        exponent: float,
        uses_result: bool,
        trainer_callbacks: list[Callback],
        copies: Callable[[Sequence[Callback]], list[Callback]],
    ) -> None:
        self.run_updates, self.budget, self.branches = run_updates, budget, branches
        self.start, self.exponent, self.uses_result = start, exponent, uses_result
        self.trainer_callbacks, self.copies = trainer_callbacks, copies
        self.found: FoundLearningRate | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs range test and branches, and ends the fit."""
        check_not_private(
            trainer.optimizers,
            "find_learning_rate",
            "whose privacy budget the branches would spend; set the learning rate by hand",
        )
        groups = BaseRates(trainer)
        of_module = [c for c in trainer_callbacks.callbacks_of(trainer) if c is not self]
        callbacks = [*self.trainer_callbacks, *of_module]
        self.found = self._search(trainer, pl_module, groups, callbacks)
        if self.uses_result:
            groups.use_in_next_fit(self.found.suggestion, trainer, pl_module)
        raise trial_runs.exit_fit(trainer)

    def _search(
        self,
        trainer: Trainer,
        module: LightningModule,
        groups: BaseRates,
        callbacks: list[Callback],
    ) -> FoundLearningRate:
        sweep = self._sweep(trainer, module, groups, callbacks)
        tested, start = sweep.result(), self.start
        initial = initial_losses(tested)
        if len(initial) < 2 or not all(map(math.isfinite, initial)):
            raise ValueError(
                "training_step must return finite losses at learning rates near 0, got "
                f"{list(initial)} in the first updates; check the data and the loss"
            )
        if start is None:
            start = highest_useful_rate(tested) / BELOW_RISE
        updates = (self.budget - sweep.steps) // self.branches
        found = run_rate_branches(
            trainer,
            module,
            groups,
            callbacks=lambda: self.copies(callbacks),
            start=start,
            count=self.branches,
            updates=updates,
        )
        rates, losses = tuple(found), [scores(branch) for branch in found.values()]
        means = [fmean(each) if each else math.inf for each in losses]
        _check_progress(rates, losses, initial, updates=updates)
        optimum = optimum_of(rates, losses, initial=fmean(initial))
        ratio = updates / self.run_updates
        factor = ratio**self.exponent
        deviation = math.hypot(
            optimum.deviation, BRANCH_DEVIATION, EXPONENT_DEVIATION * math.log(ratio)
        )
        suggestion, spread = optimum.learning_rate * factor, math.exp(1.645 * deviation)
        return FoundLearningRate(
            suggestion=suggestion,
            interval=(suggestion / spread, suggestion * spread),
            branch_optimum=optimum.learning_rate,
            horizon_factor=factor,
            learning_rates=rates,
            losses=tuple(means),
            standard_errors=paired_errors(losses, means.index(min(means))),
            edge=optimum.edge,
            sweep=tested if self.start is None else None,
            current=groups.reference,
            branch_updates=updates,
            updates=sweep.steps + sum(branch.steps for branch in found.values()),
            run_updates=self.run_updates,
        )

    def _sweep(
        self,
        trainer: Trainer,
        module: LightningModule,
        groups: BaseRates,
        callbacks: list[Callback],
    ) -> Sweep:
        """Runs the range test; with ``start`` only its beginning, for the initial loss."""
        count = _updates_of_sweep(self.budget) if self.start is None else LEAST_SWEEP
        return run_sweep(
            trainer,
            module,
            groups,
            self.copies(callbacks),
            rates=exponential_rates(1e-6, 10.0 if self.start is None else 1e-5, count),
            smoothing=0.0,
            skip=0,
            stop_at=math.inf,  # a single loss of a small batch may be far above the lowest
        )


def _check_progress(
    rates: Sequence[float],
    losses: Sequence[Sequence[float]],
    initial: Sequence[float],
    *,
    updates: int,
) -> None:
    """Raises if no branch lowers the loss, and warns if the difference may be noise."""
    start = fmean(initial)
    best = min((each for each in losses if each), key=fmean, default=())
    # A branch has too few scored losses to estimate their deviation, and these are few, too: a
    # stricter limit would warn of branches that have learned.
    error = stdev(initial) * math.sqrt(1 / max(1, len(best)) + 1 / len(initial))
    if not best or fmean(best) >= start + SIGNIFICANT * error:
        got = f"with a lowest loss of {fmean(best):.4g}" if best else "that diverged"
        raise ValueError(
            "budget and start must let a branch lower the loss, got branches of "
            f"{updates} updates with learning rates of {rates[0]:.2g} to {rates[-1]:.2g} {got} "
            f"after an initial loss of {start:.4g}; raise budget, or pass another start="
        )
    if fmean(best) > start - error:
        rank_zero_warn(
            f"The lowest loss of the branches of find_learning_rate, {fmean(best):.4g}, is not "
            f"clearly below the initial loss, {start:.4g} ± {error:.2g}: the suggestion may be "
            "arbitrary. Raise budget, or pass another start=."
        )


def _updates_of_sweep(budget: int) -> int:
    return max(LEAST_SWEEP, int(SWEEP * budget))
