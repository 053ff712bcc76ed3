"""The result of find_learning_rate: suggestion, interval, branches, cost and plot."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lightning_bigopt.reporting.plots import axes_of
from lightning_bigopt.tuning.curve import RangeTest

__all__ = ["FoundLearningRate"]


@dataclass(frozen=True, kw_only=True)
class FoundLearningRate:
    """The result of :func:`find_learning_rate`.

    The learning rates are those of the first parameter group; the other groups keep their ratios
    to it.

    Args:
        suggestion: The learning rate for the whole run: ``branch_optimum`` times
            ``horizon_factor``.
        interval: 90 % interval of the suggestion, from the deviations of the best learning rate of
            branches between batches and initial weights, and of the exponent of
            ``horizon_factor`` between tasks.
        branch_optimum: The best learning rate of a branch, see :func:`weighted_center`.
        horizon_factor: (updates of a branch / updates of the run) to the power of the exponent.
        learning_rates: The learning rate of each branch, ascending.
        losses: For each branch its loss at the end, infinite if it diverged.
        standard_errors: Standard error of the difference to the best branch, paired by batch; NaN
            for a branch that diverged.
        edge: ``"low"`` or ``"high"`` if the lowest or highest learning rate was significantly
            better than the next one, so that the optimum may be beyond it; None otherwise.
        sweep: The range test that placed the branches; None if they were placed by an argument.
        current: The learning rate of the first parameter group before the search.
        branch_updates: Updates of one branch.
        updates: Updates of the range test and all branches together.
        run_updates: Updates of the whole run.

    Example:
        >>> found = FoundLearningRate(
        ...     suggestion=3e-3,
        ...     interval=(2e-3, 5e-3),
        ...     branch_optimum=1e-2,
        ...     horizon_factor=0.3,
        ...     learning_rates=(4e-3, 1e-2, 2.5e-2),
        ...     losses=(2.4, 2.2, 2.5),
        ...     standard_errors=(0.02, 0.0, 0.05),
        ...     edge=None,
        ...     sweep=None,
        ...     current=1e-3,
        ...     branch_updates=25,
        ...     updates=75,
        ...     run_updates=1000,
        ... )
        >>> found.bracket, found.cost, found.factor
        ((0.004, 0.025), 0.075, 3.0)
    """

    suggestion: float
    interval: tuple[float, float]
    branch_optimum: float
    horizon_factor: float
    learning_rates: tuple[float, ...]
    losses: tuple[float, ...]
    standard_errors: tuple[float, ...]
    edge: str | None
    sweep: RangeTest | None
    current: float
    branch_updates: int
    updates: int
    run_updates: int

    @property
    def bracket(self) -> tuple[float, float]:
        """The lowest and the highest learning rate of the branches."""
        return self.learning_rates[0], self.learning_rates[-1]

    @property
    def factor(self) -> float:
        """The suggestion divided by the current learning rate, for all parameter groups."""
        return self.suggestion / self.current

    @property
    def cost(self) -> float:
        """The updates as a fraction of the whole run."""
        return self.updates / self.run_updates

    def __str__(self) -> str:
        low, high = self.interval
        lines = [
            f"Learning rate {self.suggestion:.3g} for {self.run_updates} updates",
            f"  factor on the current one: {self.factor:.3g}",
            f"  90 % interval: {low:.2g} to {high:.2g}",
            f"  best for {self.branch_updates} updates: {self.branch_optimum:.3g}",
            f"  factor for the longer run: {self.horizon_factor:.3g}",
            f"  cost: {self.updates} updates, {self.cost:.1%} of the run",
            "  learning rate  loss",
        ]
        for rate, loss, error in zip(
            self.learning_rates, self.losses, self.standard_errors, strict=True
        ):
            shown = f"{loss:.4g} ± {error:.2g}" if math.isfinite(loss) else "diverged"
            lines.append(f"  {rate:<13.3g}  {shown}")
        if self.edge is not None:
            lines.append(f"  the {self.edge}est was the best: the best one may be {self.edge}er")
        return "\n".join(lines)

    def plot(self, ax: Any = None) -> Any:
        """Plots the losses of the branches over the learning rate, with the suggestion.

        Args:
            ax: Matplotlib axes to draw on; None for new ones.

        Returns:
            The axes.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        ax = axes_of(ax)
        points = [
            (rate, loss, 0.0 if math.isnan(error) else error)
            for rate, loss, error in zip(
                self.learning_rates, self.losses, self.standard_errors, strict=True
            )
            if math.isfinite(loss)
        ]
        if points:
            rates, losses, errors = zip(*points, strict=True)
            ax.errorbar(rates, losses, errors, fmt="o-", capsize=3, label="branches")
        ax.axvline(self.branch_optimum, color="0.6", linestyle="--", label="best for a branch")
        ax.axvline(self.suggestion, color="C1", label=f"suggestion {self.suggestion:.2g}")
        ax.axvspan(*self.interval, color="C1", alpha=0.15, label="90 % interval")
        ax.set(xscale="log", xlabel="learning rate", ylabel="training loss")
        ax.legend()
        return ax
