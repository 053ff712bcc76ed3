"""The result of a learning-rate range test: smoothed losses, suggested rate, bracket, plot."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_bigopt.checks import check_between, check_count, check_positive, shown
from lightning_bigopt.reporting.plots import axes_of
from lightning_bigopt.type_checks import check_instance

__all__ = ["RangeTest", "exponential_rates", "smooth", "steepest", "valley"]


@dataclass(frozen=True, kw_only=True)
class RangeTest:
    """The result of a learning-rate range test.

    The learning rates are those of the first parameter group; the other groups keep their ratios
    to it.

    Args:
        learning_rates: The learning rates tried, ascending.
        losses: For each learning rate the training loss of its update, computed before the update.
        smoothing: Decay of the moving average of the losses.
        skip: Number of first points that the suggestion ignores.
        diverged: Whether the sweep ended early because the loss rose.

    Attributes:
        smoothed: The bias-corrected moving average of the losses.
        suggestion: The learning rate at the steepest descent of the smoothed loss over the
            logarithm of the learning rate; None if the loss never falls.
        bracket: Two further suggestions, the lower first: the middle of the longest descent (the
            valley), and a tenth of the learning rate at the minimum. None if the loss never falls.

    Example:
        >>> rates = exponential_rates(1e-6, 1.0, 61)
        >>> losses = [5 - 4 / (1 + (1e-3 / rate) ** 2) + (10 * rate) ** 2 for rate in rates]
        >>> found = RangeTest(learning_rates=rates, losses=losses, smoothing=0.0)
        >>> round(math.log10(found.suggestion), 1)
        -3.0
    """

    learning_rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothing: float = 0.98
    skip: int = 10
    diverged: bool = False
    smoothed: tuple[float, ...] = field(init=False)
    suggestion: float | None = field(init=False)
    bracket: tuple[float, float] | None = field(init=False)

    def __post_init__(self) -> None:
        for name, values in (("learning_rates", self.learning_rates), ("losses", self.losses)):
            if not isinstance(values, (list, tuple)):
                raise ValueError(
                    f"{name} must be a tuple of numbers, got {shown(values)}; write one number for "
                    "each update of the sweep"
                )
        for index, rate in enumerate(self.learning_rates):
            check_positive(f"learning_rates[{index}]", rate, hint="write 1e-3")
        for index, loss in enumerate(self.losses):  # a diverged run ends with infinities or NaN
            check_instance(f"losses[{index}]", loss, float, hint="write a float")
        if len(self.learning_rates) != len(self.losses):
            raise ValueError(
                "losses and learning_rates must have the same length, got "
                f"{len(self.losses)} and {len(self.learning_rates)}; remove the others"
            )
        check_between("smoothing", self.smoothing, 0, 1, ends="[)", hint="write 0.98")
        check_count("skip", self.skip, minimum=0, of="points")
        check_instance("diverged", self.diverged, bool, hint="write False")
        rates, losses = tuple(self.learning_rates), tuple(self.losses)
        smoothed = smooth(losses, self.smoothing)
        usable, curve = rates[self.skip :], smoothed[self.skip :]
        at = steepest(usable, curve)
        bracket = None
        if at is not None:
            tenth = usable[min(range(len(curve)), key=curve.__getitem__)] / 10
            middle = valley(usable, curve)
            bracket = (min(middle, tenth), max(middle, tenth))
        for name, value in (
            ("learning_rates", rates),
            ("losses", losses),
            ("smoothed", smoothed),
            ("suggestion", None if at is None else usable[at]),
            ("bracket", bracket),
        ):
            object.__setattr__(self, name, value)

    def plot(self, ax: Any = None) -> Any:
        """Plots the losses over the learning rates, with suggestion and bracket.

        Args:
            ax: Matplotlib axes to draw on; None for new ones.

        Returns:
            The axes.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        ax = axes_of(ax)
        ax.plot(self.learning_rates, self.losses, color="0.75", label="loss")
        ax.plot(self.learning_rates, self.smoothed, label="smoothed")
        if self.suggestion is not None and self.bracket is not None:
            ax.axvline(self.suggestion, color="C1", label=f"suggestion {self.suggestion:.2g}")
            ax.axvspan(
                *self.bracket, alpha=0.15, label="other rules {:.2g}, {:.2g}".format(*self.bracket)
            )
        finite = [loss for loss in self.smoothed if math.isfinite(loss)]
        if finite:
            margin = 0.05 * (max(finite) - min(finite)) or 1.0
            ax.set_ylim(min(finite) - 2 * margin, max(finite) + 2 * margin)
        ax.set(xscale="log", xlabel="learning rate", ylabel="training loss")
        ax.legend()
        return ax


def exponential_rates(start: float, end: float, count: int) -> tuple[float, ...]:
    """Returns ``count`` learning rates from ``start`` to ``end``, equally spaced in log scale.

    Example:
        >>> [round(rate, 3) for rate in exponential_rates(0.001, 1.0, 4)]
        [0.001, 0.01, 0.1, 1.0]
    """
    return tuple(start * (end / start) ** (index / (count - 1)) for index in range(count))


def smooth(losses: Sequence[float], decay: float) -> tuple[float, ...]:
    """Computes a bias-corrected exponential moving average; non-finite losses are skipped.

    Example:
        >>> smooth([2.0, 4.0, float("nan")], 0.5)
        (2.0, 3.3333333333333335, 3.3333333333333335)
    """
    total, weight, smoothed = 0.0, 0.0, []
    for loss in losses:
        if math.isfinite(loss):
            total = decay * total + (1 - decay) * loss
            weight = decay * weight + (1 - decay)
        smoothed.append(total / weight if weight else math.nan)
    return tuple(smoothed)


def steepest(rates: Sequence[float], losses: Sequence[float]) -> int | None:
    """Returns the index at which the loss falls fastest over log(rate), by central differences.

    Returns None if the loss never falls, or for fewer than three points.

    Example:
        >>> steepest([0.1, 1.0, 10.0, 100.0], [3.0, 2.9, 1.0, 1.5])
        1
    """
    if len(rates) < 3:
        return None
    slopes = {
        i: (losses[i + 1] - losses[i - 1]) / math.log(rates[i + 1] / rates[i - 1])
        for i in range(1, len(rates) - 1)
    }
    # The average is NaN until the first finite loss; a NaN slope must not win the comparison.
    best = min(slopes, key=lambda i: math.inf if math.isnan(slopes[i]) else slopes[i])
    return best if slopes[best] < 0 else None


def valley(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Returns the middle, in log(rate), of the longest decreasing subsequence of the losses.

    Example:
        >>> valley([0.1, 1.0, 10.0, 100.0, 1000.0], [5.0, 4.0, 6.0, 3.0, 9.0])
        3.162...
    """
    # Patience sorting: for each length of a subsequence, the last loss (negated, so that bisect
    # can search an ascending list) and its index, of the subsequence that is easiest to extend.
    ends: list[float] = []
    at: list[int] = []
    before: list[int | None] = []  # the predecessor of each point in its subsequence
    for index, loss in enumerate(losses):
        length = bisect_left(ends, -loss)
        before.append(at[length - 1] if length else None)
        ends[length : length + 1] = [-loss]
        at[length : length + 1] = [index]
    first = last = at[-1]
    while (previous := before[first]) is not None:
        first = previous
    return math.sqrt(rates[first] * rates[last])
