"""What a learning-rate sweep says: smoothing, the steepest descent, the valley."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_bigopt.reporting.plots import axes_of

__all__ = ["RangeTest", "exponential_rates", "smooth", "steepest", "valley"]


@dataclass(frozen=True, kw_only=True)
class RangeTest:
    """The result of a learning-rate range test.

    The rates are those of the first parameter group; the others keep their ratios to it.

    Args:
        learning_rates: The rates tried, ascending.
        losses: The training loss of the update that used each, before it was applied.
        smoothing: Decay of the losses' moving average.
        skip: First points that no suggestion is made from.
        diverged: Whether the sweep ended because the loss rose.

    Attributes:
        smoothed: The bias-corrected moving average of the losses.
        suggestion: The rate where the smoothed loss falls fastest against the logarithm of the
            rate; None where it falls nowhere.
        bracket: Two further rates, the lower first: the middle of the longest descent (the valley)
            and a tenth of the rate at the minimum. None where the loss falls nowhere.

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
        """Draws the sweep with its suggestion and bracket.

        Args:
            ax: Matplotlib axes to draw on; None for new ones.

        Returns:
            The axes.

        Raises:
            ImportError: Without matplotlib.
        """
        ax = axes_of(ax)
        ax.plot(self.learning_rates, self.losses, color="0.75", label="loss")
        ax.plot(self.learning_rates, self.smoothed, label="smoothed")
        if self.suggestion is not None and self.bracket is not None:
            ax.axvline(self.suggestion, color="C1", label=f"suggestion {self.suggestion:.2g}")
            ax.axvspan(*self.bracket, alpha=0.15, label="[{:.2g}, {:.2g}]".format(*self.bracket))
        finite = [loss for loss in self.smoothed if math.isfinite(loss)]
        if finite:
            room = 0.05 * (max(finite) - min(finite)) or 1.0
            ax.set_ylim(min(finite) - 2 * room, max(finite) + 2 * room)
        ax.set(xscale="log", xlabel="learning rate", ylabel="training loss")
        ax.legend()
        return ax


def exponential_rates(start: float, end: float, count: int) -> tuple[float, ...]:
    """``count`` rates from ``start`` to ``end``, each the same multiple of the one before.

    Example:
        >>> [round(rate, 3) for rate in exponential_rates(0.001, 1.0, 4)]
        [0.001, 0.01, 0.1, 1.0]
    """
    return tuple(start * (end / start) ** (index / (count - 1)) for index in range(count))


def smooth(losses: Sequence[float], decay: float) -> tuple[float, ...]:
    """An exponential moving average without the bias of its start; what is not finite enters not.

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
    """The index where the loss falls fastest against log(rate), by central differences.

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
    best = min(slopes, key=lambda i: slopes[i] if slopes[i] == slopes[i] else math.inf)
    return best if slopes[best] < 0 else None


def valley(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The middle, in log(rate), of the longest descent: the longest decreasing subsequence.

    Example:
        >>> valley([0.1, 1.0, 10.0, 100.0, 1000.0], [5.0, 4.0, 6.0, 3.0, 9.0])
        3.162...
    """
    ends: list[float] = []  # the last, negated, loss of the best descent of each length
    at: list[int] = []
    before: list[int | None] = []
    for index, loss in enumerate(losses):
        length = bisect_left(ends, -loss)
        before.append(at[length - 1] if length else None)
        ends[length : length + 1] = [-loss]
        at[length : length + 1] = [index]
    first = last = at[-1]
    while (previous := before[first]) is not None:
        first = previous
    return math.sqrt(rates[first] * rates[last])
