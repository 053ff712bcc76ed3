"""Decides whether an update may happen: detectors of bad steps, in pure Python on one number.

A detector is a frozen specification; what it has seen lies in a state of plain lists that the
caller keeps and saves. :func:`inspect` looks without changing anything, :func:`record` takes the
outcome in, once an update:

>>> detectors = (NonFinite(), NormSpike(armed=2))
>>> states = [detector.initial_state() for detector in detectors]
>>> for norm in (1.0, 1.1, 0.9, 50.0, float("nan"), 1.0):
...     readings = {"norm": norm}
...     verdict = inspect(detectors, states, readings)
...     record(detectors, states, readings, verdict)
...     print(norm, "accepted" if verdict is None else verdict.detector)
1.0 accepted
1.1 accepted
0.9 accepted
50.0 NormSpike
nan NonFinite
1.0 accepted
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from statistics import median
from typing import Any, ClassVar, Literal, TypeAlias

from lightning_bigopt.gradients.rules.base import check_count, check_positive

__all__ = [
    "Detector",
    "DetectorState",
    "LossSpike",
    "NonFinite",
    "NormSpike",
    "Quantity",
    "Verdict",
    "inspect",
    "record",
]

DetectorState: TypeAlias = dict[str, Any]
Quantity: TypeAlias = Literal["norm", "loss"]

# Makes the median absolute deviation of a normal distribution its standard deviation.
_MAD_TO_SIGMA = 1.4826


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why an update is rejected.

    Args:
        detector: The detector's class name.
        quantity: What it looked at.
        value: What it saw.
        limit: What would have been accepted; None where that is not one number.
        reason: One sentence for people.

    Example:
        >>> NonFinite().check(float("inf"), {}).reason
        'the gradient norm is inf'
    """

    detector: str
    quantity: Quantity
    value: float
    limit: float | None
    reason: str


class Detector(ABC):
    """Judges one number an update. Subclasses are frozen dataclasses.

    Attributes:
        quantity: What it looks at: the gradient ``"norm"`` before clipping, or the ``"loss"``,
            the mean over the window and all processes.

    Example:
        >>> NonFinite().quantity
        'norm'
    """

    quantity: ClassVar[Quantity] = "norm"

    def initial_state(self) -> DetectorState:
        """What it has seen before the first update; loads with ``weights_only=True``."""
        return {}

    @abstractmethod
    def check(self, value: float, state: DetectorState) -> Verdict | None:
        """Why the update is bad, or None. Changes nothing."""

    @abstractmethod
    def accept(self, value: float, state: DetectorState) -> None:
        """Takes in a value whose update happened."""

    @abstractmethod
    def reject(self, value: float, state: DetectorState) -> None:
        """Takes in a value that this detector rejected."""


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


def inspect(
    detectors: Sequence[Detector],
    states: Sequence[DetectorState],
    readings: Mapping[Quantity, float],
) -> Verdict | None:
    """What the first detector that objects has to say; None where none does. Changes nothing.

    Args:
        detectors: In order.
        states: One for each.
        readings: The norm, the loss, or both; a detector without its reading is passed over.

    Returns:
        The verdict, the same on every process where the readings are.

    Example:
        >>> inspect([NonFinite()], [{}], {"norm": float("nan")}).value
        nan
    """
    for detector, state in zip(detectors, states, strict=True):
        if detector.quantity in readings:
            verdict = detector.check(readings[detector.quantity], state)
            if verdict is not None:
                return verdict
    return None


def record(
    detectors: Sequence[Detector],
    states: Sequence[DetectorState],
    readings: Mapping[Quantity, float],
    verdict: Verdict | None,
) -> None:
    """Takes one update's outcome into the states. To be called exactly once an update.

    Values of a rejected update never enter a history of accepted ones. A rejection counts only
    with the detectors that object themselves.

    Args:
        detectors: In order.
        states: One for each, changed in place.
        readings: As given to :func:`inspect`.
        verdict: What :func:`inspect` said, or None where the update happened anyway.

    Example:
        >>> spike = NormSpike()
        >>> states = [spike.initial_state()]
        >>> record([spike], states, {"norm": 1.0}, None)
        >>> states
        [{'accepted': [0.0], 'rejected': []}]
    """
    for detector, state in zip(detectors, states, strict=True):
        if detector.quantity not in readings:
            continue
        value = readings[detector.quantity]
        if verdict is None:
            detector.accept(value, state)
        elif detector.check(value, state) is not None:
            detector.reject(value, state)
