"""Detectors of bad steps: what is not finite, and spikes of the norm or of the loss."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass
from statistics import median
from typing import ClassVar

from lightning_bigopt.gradients.guard import Detector, DetectorState, Quantity, Verdict
from lightning_bigopt.gradients.rules.base import check_count, check_positive

__all__ = ["LossSpike", "NonFinite", "NormSpike"]

# Makes the median absolute deviation of a normal distribution its standard deviation.
_MAD_TO_SIGMA = 1.4826


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
    """Compares a score with the median and the spread of accepted scores."""

    window: int = 128
    _: KW_ONLY
    armed: int = 32
    threshold: float = 6.0
    floor: float = 0.05
    max_rejections: int = 5

    def __post_init__(self) -> None:
        check_count("window", self.window)
        check_count("armed", self.armed)
        check_count("max_rejections", self.max_rejections)
        check_positive("threshold", self.threshold)
        check_positive("floor", self.floor)
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

    def typical(self, state: DetectorState) -> float | None:
        """The median of accepted values; None before there is one."""
        accepted: list[float] = state["accepted"]
        return self.unscore(median(accepted)) if accepted else None

    def limit(self, state: DetectorState) -> float:
        """The greatest value that is typical; ``inf`` until armed."""
        accepted: list[float] = state["accepted"]
        if len(accepted) < self.armed:
            return math.inf
        middle = median(accepted)
        spread = _MAD_TO_SIGMA * median(abs(score - middle) for score in accepted)
        return self.unscore(middle + self.threshold * max(spread, self.floor))

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


@dataclass(frozen=True)
class NormSpike(_Spike):
    r"""Rejects a gradient norm far above the norms of accepted updates.

    .. math:: \log g > m + \theta \max(1.4826\,\mathrm{MAD}, \text{floor})

    with the median :math:`m` and the median absolute deviation of the last ``window`` accepted
    log-norms. After ``max_rejections`` finite rejections in a row the next norm is accepted: the
    regime has changed, and the window begins anew with the rejected norms. State: ``accepted`` and
    ``rejected``, log-norms; norms that are not finite never enter it.

    Args:
        window: How many accepted norms are remembered.
        armed: How many are needed before any is rejected.
        threshold: :math:`\theta`, in standard deviations.
        floor: The least standard deviation of the log-norm, for very even runs.
        max_rejections: How many may be rejected in a row.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> spike = NormSpike(armed=3)
        >>> state = spike.initial_state()
        >>> for norm in (1.0, 1.1, 0.9):
        ...     spike.accept(norm, state)
        >>> spike.check(100.0, state).reason
        'the gradient norm is 100, typically 1, at most 2.335'
    """

    noun: ClassVar[str] = "gradient norm"

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
    ``floor`` is in units of the loss.

    Args:
        window: How many accepted losses are remembered.
        armed: How many are needed before any is rejected.
        threshold: In standard deviations.
        floor: The least standard deviation of the loss.
        max_rejections: How many may be rejected in a row.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> LossSpike(threshold=8.0).quantity
        'loss'
    """

    quantity: ClassVar[Quantity] = "loss"
    noun: ClassVar[str] = "loss"

    def score(self, value: float) -> float:
        """The loss."""
        return value

    def unscore(self, score: float) -> float:
        """The loss."""
        return score
