"""Detectors of bad steps: non-finite gradients, and spikes of the gradient norm or the loss."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from statistics import median
from typing import ClassVar

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import check_between, check_count, check_positive, shown
from lightning_bigopt.gradients.guard import Detector, DetectorState, Quantity, Verdict

__all__ = ["LossSpike", "NonFinite", "NormSpike"]

# Median absolute difference of two normal numbers → standard deviation of one.
_MEDIAN_TO_SIGMA = 1.4826 / math.sqrt(2.0)


@explain_arguments
@dataclass(frozen=True)
class NonFinite(Detector):
    """Rejects an update with a NaN or an infinity in its gradient. Has no state.

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
        """Does nothing."""

    def reject(self, value: float, state: DetectorState) -> None:
        """Does nothing."""


@dataclass(frozen=True)
class _Spike(Detector):
    """Compares a score with the recent median and the spread of accepted scores."""

    window: int = 128
    _: KW_ONLY
    armed: int = 32
    threshold: float = 6.0
    max_rejections: int = 5

    noun: ClassVar[str] = "value"

    def __post_init__(self) -> None:
        check_count("window", self.window)
        check_count("armed", self.armed)
        check_count("max_rejections", self.max_rejections)
        check_positive("threshold", self.threshold)
        if self.armed > self.window:
            raise ValueError(
                f"armed must be at most window, got {shown(self.armed)} with "
                f"window={self.window!r}; lower armed"
            )

    def initial_state(self) -> DetectorState:
        """Returns empty histories."""
        return {"accepted": [], "rejected": []}

    def carry_over(self, state: DetectorState) -> DetectorState:
        """Keeps the accepted scores, which are measured, without the rejections.

        With an empty history the updates after the resume would not be checked.
        """
        return {"accepted": list(state["accepted"][-self.window :]), "rejected": []}

    @abstractmethod
    def score(self, value: float) -> float:
        """Returns the score of a value; not finite if it has none."""

    @abstractmethod
    def unscore(self, score: float) -> float:
        """Returns the value of a score."""

    @property
    @abstractmethod
    def least_excess(self) -> float:
        """Smallest distance above the median at which a score is rejected."""

    def typical(self, state: DetectorState) -> float | None:
        """Returns the median of the last eighth of the history; None for an empty one."""
        accepted: list[float] = state["accepted"]
        return self.unscore(self._recent_median(accepted)) if accepted else None

    def _recent_median(self, accepted: list[float]) -> float:
        return median(accepted[-max(1, self.window // 8) :])

    def limit(self, state: DetectorState) -> float:
        """Returns the largest value that is accepted; ``inf`` until armed."""
        accepted: list[float] = state["accepted"]
        if len(accepted) < self.armed:
            return math.inf
        middle = self._recent_median(accepted)
        return self.unscore(max(middle + self.least_excess, self._usual_limit(accepted, middle)))

    def _usual_limit(self, accepted: list[float], middle: float) -> float:
        """Returns the largest usual score, estimated from the history."""
        return middle + self.threshold * spread(accepted)

    def check(self, value: float, state: DetectorState) -> Verdict | None:
        """Rejects a finite value above the limit; :class:`NonFinite` rejects the others."""
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

    def accept(self, value: float, state: DetectorState) -> None:
        """Adds a score to the history, which starts again after too many rejections."""
        score = self.score(value)
        if not math.isfinite(score):
            return
        if len(state["rejected"]) >= self.max_rejections and value > self.limit(state):
            # The level of the values has changed, and the old history would reject all new ones.
            # The rejected scores start a new history, which rejects nothing until it is armed.
            state["accepted"] = list(state["rejected"])
        state["rejected"] = []
        state["accepted"].append(score)
        del state["accepted"][: -self.window]

    def reject(self, value: float, state: DetectorState) -> None:
        """Counts a finite rejection and keeps its score."""
        score = self.score(value)
        if math.isfinite(score):
            state["rejected"].append(score)


def spread(scores: Sequence[float]) -> float:
    """Estimates a standard deviation from differences of neighbors, robust to outliers and drift.

    The median of the absolute differences is scaled to the standard deviation of independent
    normal scores (Rice 1984, with a median in place of the mean). A trend adds only its slope per
    step to the differences; to deviations from one median it would add its full height.

    Args:
        scores: Scores in order of time.

    Returns:
        The estimate, in units of the scores; 0 for less than two.

    Example:
        >>> noise = [0.0, 0.1, -0.1, 0.2, 0.0, -0.2, 0.1, 9.0, 0.1]
        >>> drifting = [score - 0.01 * step for step, score in enumerate(noise)]
        >>> round(spread(noise), 2), round(spread(drifting), 2)
        (0.26, 0.26)
    """
    differences = [abs(after - before) for before, after in pairwise(scores)]
    return _MEDIAN_TO_SIGMA * median(differences) if differences else 0.0


@explain_arguments
@dataclass(frozen=True)
class NormSpike(_Spike):
    r"""Rejects a gradient norm far above the norms of accepted updates.

    .. math::
        \log g > \max\bigl(m + \log r,\; \min(m + \theta \sigma,\; x_{(2)} + \log c)\bigr), \qquad
        \sigma = \frac{1.4826}{\sqrt 2} \operatorname{median} |x_t - x_{t-1}|

    with the log-norms :math:`x` of the last ``window`` accepted updates, the median :math:`m` of
    the last eighth of them and the second largest :math:`x_{(2)}` of the last half. In words: a
    norm is rejected if it is more than :math:`r` times the recent median, and also more than
    :math:`\theta` standard deviations above it or more than :math:`c` times the second-largest
    recent norm.

    The smaller of these two limits applies. If the norms of a run swing, for example because the
    model has memorized most of its data, :math:`\sigma` is so large that spikes of 100 times the
    median are within :math:`\theta \sigma`, but they are above the largest recent norms. If the
    norms fall, as during the warm-up of the learning rate, the largest recent norms are old, but
    :math:`\sigma` contains only the slope. One accepted spike hardly changes either limit.

    After ``max_rejections`` finite rejections in a row the next norm is accepted, because the level
    of the norms has changed, and the history starts again with the rejected norms. State:
    ``accepted`` and ``rejected``, log-norms; non-finite norms never enter it.

    Args:
        window: Number of accepted norms in the history.
        armed: Number of accepted norms before any norm is rejected.
        threshold: :math:`\theta`, in standard deviations.
        ratio: :math:`r`: norms below this multiple of the median are never rejected. Raise it for
            batches of one or two samples.
        margin: :math:`c`: norms above this multiple of the second-largest recent norm are rejected,
            however large the standard deviation is. Raise it if good updates of a run whose norms
            swing are rejected; ``inf`` disables this limit.
        max_rejections: Largest number of rejections in a row.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> spike = NormSpike(armed=3)
        >>> state = spike.initial_state()
        >>> for norm in (1.0, 1.1, 0.9):
        ...     spike.accept(norm, state)
        >>> spike.check(100.0, state).reason
        'the gradient norm is 100, typically 1, at most 5'
    """

    _: KW_ONLY
    ratio: float = 5.0
    margin: float = 2.0

    noun: ClassVar[str] = "gradient norm"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between("ratio", self.ratio, 1, math.inf, hint="try 5.0")
        check_between("margin", self.margin, 1, math.inf, ends="(]", hint="try 2.0")

    def _usual_limit(self, accepted: list[float], middle: float) -> float:
        """Returns the smaller of two limits: by the spread, and by the largest recent norms."""
        recent = sorted(accepted[-max(2, self.window // 2) :])
        # The second largest: one accepted spike must not raise the limit for the next ones.
        largest = recent[-min(2, len(recent))] + math.log(self.margin)
        return min(super()._usual_limit(accepted, middle), largest)

    @property
    def least_excess(self) -> float:
        """Logarithm of the ratio."""
        return math.log(self.ratio)

    def score(self, value: float) -> float:
        """Returns the logarithm of a norm."""
        return math.log(value) if value > 0 else -math.inf

    def unscore(self, score: float) -> float:
        """Returns the norm of a log-norm."""
        return math.exp(min(score, 709.0))  # math.exp raises OverflowError above


@explain_arguments
@dataclass(frozen=True)
class LossSpike(_Spike):
    r"""Rejects a loss far above the losses of accepted updates.

    .. math:: \ell > m + \theta \max(\sigma, \text{floor})

    with the median :math:`m` of the last eighth of the history and the standard deviation
    :math:`\sigma` of :class:`NormSpike`. The losses are used themselves, not their logarithms,
    because they may be negative; the smallest distance from the median is in units of the loss.

    Args:
        window: Number of accepted losses in the history.
        armed: Number of accepted losses before any loss is rejected.
        threshold: Number of standard deviations above the median.
        floor: Smallest standard deviation of the loss: a loss less than ``threshold * floor``
            above the median is never rejected.
        max_rejections: Largest number of rejections in a row.

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
        """Returns the loss."""
        return value

    def unscore(self, score: float) -> float:
        """Returns the loss."""
        return score
