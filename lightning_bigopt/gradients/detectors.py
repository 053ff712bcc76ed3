"""Detectors of bad steps: what is not finite, and spikes of the norm or of the loss."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from statistics import median
from typing import ClassVar

from lightning_bigopt.gradients.guard import Detector, DetectorState, Quantity, Verdict
from lightning_bigopt.gradients.rules.base import check_count, check_positive

__all__ = ["LossSpike", "NonFinite", "NormSpike"]

# From the median absolute difference of two normal numbers to the standard deviation of one.
_MEDIAN_TO_SIGMA = 1.4826 / math.sqrt(2.0)


@dataclass(frozen=True)
class NonFinite(Detector):
    """Rejects an update whose gradient holds a NaN or an infinity. Keeps no state.

    Example:
        >>> NonFinite().check(1.0, {}) is None
        True
    """

    def check(self, value: float, state: DetectorState) -> Verdict | None:
        """Rejects NaN and infinities."""
        if math.isfinite(value):
            return None
        return Verdict(
            detector=type(self).__name__,
            quantity=self.quantity,
            value=value,
            limit=None,
            reason=f"the gradient norm is {value}",
        )

    def accept(self, value: float, state: DetectorState) -> None:
        """Remembers nothing."""

    def reject(self, value: float, state: DetectorState) -> None:
        """Remembers nothing."""


@dataclass(frozen=True)
class _Spike(Detector):
    """Compares a score with the recent median and the spread of accepted scores."""

    window: int = 128
    _: KW_ONLY
    armed: int = 32
    threshold: float = 6.0
    max_rejections: int = 5

    def __post_init__(self) -> None:
        check_count("window", self.window)
        check_count("armed", self.armed)
        check_count("max_rejections", self.max_rejections)
        check_positive("threshold", self.threshold)
        if self.armed > self.window:
            raise ValueError(
                f"armed must be at most window, got {self.armed!r} with window={self.window!r}"
            )

    def initial_state(self) -> DetectorState:
        """Nothing accepted, nothing rejected."""
        return {"accepted": [], "rejected": []}

    @abstractmethod
    def score(self, value: float) -> float:
        """The number whose distribution is followed; not finite where there is none."""

    @abstractmethod
    def unscore(self, score: float) -> float:
        """The value of a score."""

    @property
    @abstractmethod
    def least_excess(self) -> float:
        """How far beyond the median a score must lie at the least."""

    def typical(self, state: DetectorState) -> float | None:
        """The median of the last quarter of the window; None before anything was accepted."""
        accepted: list[float] = state["accepted"]
        return self.unscore(self._middle(accepted)) if accepted else None

    def _middle(self, accepted: list[float]) -> float:
        return median(accepted[-max(1, self.window // 4) :])

    def limit(self, state: DetectorState) -> float:
        """The greatest value that is typical; ``inf`` until armed."""
        accepted: list[float] = state["accepted"]
        if len(accepted) < self.armed:
            return math.inf
        excess = max(self.threshold * spread(accepted), self.least_excess)
        return self.unscore(self._middle(accepted) + excess)

    def check(self, value: float, state: DetectorState) -> Verdict | None:
        """Rejects a value beyond the limit; what is not finite is left to :class:`NonFinite`."""
        if not math.isfinite(value) or len(state["rejected"]) >= self.max_rejections:
            return None
        limit = self.limit(state)
        if value <= limit:
            return None
        typical = self.typical(state)
        return Verdict(
            detector=type(self).__name__,
            quantity=self.quantity,
            value=value,
            limit=limit,
            reason=f"the {self.noun} is {value:.4g}, typically {typical:.4g}, at most {limit:.4g}",
        )

    noun: ClassVar[str] = "value"

    def accept(self, value: float, state: DetectorState) -> None:
        """Adds a score to the window; after too many rejections the window begins anew."""
        score = self.score(value)
        if not math.isfinite(score):
            return
        if len(state["rejected"]) >= self.max_rejections and value > self.limit(state):
            # A new regime: the old window would reject all of it, so what was rejected seeds the
            # new one, and the detector is not armed until that is long enough.
            state["accepted"] = list(state["rejected"])
        state["rejected"] = []
        state["accepted"].append(score)
        del state["accepted"][: -self.window]

    def reject(self, value: float, state: DetectorState) -> None:
        """Counts a finite rejection, with its score."""
        score = self.score(value)
        if math.isfinite(score):
            state["rejected"].append(score)


def spread(scores: Sequence[float]) -> float:
    """A standard deviation that neither outliers nor a drift move: from neighbors' differences.

    The median of absolute differences, scaled to the standard deviation of independent normal
    scores (Rice 1984, with a median for the mean). A trend adds only its slope to it, where it
    would add its whole height to a deviation from one median.

    Example:
        >>> noise = [0.0, 0.1, -0.1, 0.2, 0.0, -0.2, 0.1, 9.0, 0.1]
        >>> drifting = [score - 0.01 * step for step, score in enumerate(noise)]
        >>> round(spread(noise), 2), round(spread(drifting), 2)
        (0.26, 0.26)
    """
    differences = [abs(after - before) for before, after in pairwise(scores)]
    return _MEDIAN_TO_SIGMA * median(differences) if differences else 0.0


@dataclass(frozen=True)
class NormSpike(_Spike):
    r"""Rejects a gradient norm far above the norms of accepted updates.

    .. math:: \log g > m + \max(\theta \sigma, \log r), \qquad
        \sigma = \frac{1.4826}{\sqrt 2} \operatorname{median} |x_t - x_{t-1}|

    with the log-norms :math:`x` of the last ``window`` accepted updates and the median :math:`m`
    of the last quarter of them. Neither moves with an outlier, and both follow norms that drift,
    as they do while the learning rate warms up. Good batches have norms of two or three times the
    median now and then, which :math:`\sigma` does not tell: hence the least ratio :math:`r`.

    After ``max_rejections`` finite rejections in a row the next norm is accepted: the regime has
    changed, and the window begins anew with the rejected norms. State: ``accepted`` and
    ``rejected``, log-norms; norms that are not finite never enter it.

    Args:
        window: How many accepted norms are remembered.
        armed: How many are needed before any is rejected.
        threshold: :math:`\theta`, in standard deviations.
        ratio: :math:`r`: what is below so many times the median is never rejected. Raise it for
            batches of one or two samples.
        max_rejections: How many may be rejected in a row.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> spike = NormSpike(armed=3)
        >>> state = spike.initial_state()
        >>> for norm in (1.0, 1.1, 0.9):
        ...     spike.accept(norm, state)
        >>> spike.check(100.0, state).reason
        'the gradient norm is 100, typically 1, at most 4'
    """

    _: KW_ONLY
    ratio: float = 4.0

    noun: ClassVar[str] = "gradient norm"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("ratio", self.ratio)
        if self.ratio <= 1:
            raise ValueError(f"ratio must be above 1, got {self.ratio!r}; try 4.0")

    @property
    def least_excess(self) -> float:
        """The logarithm of the ratio."""
        return math.log(self.ratio)

    def score(self, value: float) -> float:
        """The logarithm of the norm."""
        return math.log(value) if value > 0 else -math.inf

    def unscore(self, score: float) -> float:
        """The norm of a log-norm."""
        return math.exp(min(score, 709.0))


@dataclass(frozen=True)
class LossSpike(_Spike):
    """Rejects a loss far above the losses of accepted updates.

    As :class:`NormSpike`, on the loss itself (which may be negative) instead of a logarithm, so
    that the least distance from the median is in units of the loss, not a ratio.

    Args:
        window: How many accepted losses are remembered.
        armed: How many are needed before any is rejected.
        threshold: In standard deviations.
        floor: The least standard deviation of the loss: what is less than ``threshold * floor``
            above the median is never rejected.
        max_rejections: How many may be rejected in a row.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> LossSpike(threshold=8.0).quantity
        'loss'
    """

    _: KW_ONLY
    floor: float = 0.2

    quantity: ClassVar[Quantity] = "loss"
    noun: ClassVar[str] = "loss"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("floor", self.floor)

    @property
    def least_excess(self) -> float:
        """Threshold times floor."""
        return self.threshold * self.floor

    def score(self, value: float) -> float:
        """The loss."""
        return value

    def unscore(self, score: float) -> float:
        """The loss."""
        return score
