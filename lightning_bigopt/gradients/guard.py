"""Decides whether an update may happen: detectors of bad steps, in pure Python on one number.

A detector is a frozen specification; what it has seen lies in a state of plain lists that the
caller keeps and saves. :func:`inspect` looks without changing anything, :func:`record` takes the
outcome in, once an update:

>>> from lightning_bigopt.gradients import NonFinite, NormSpike
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

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

__all__ = [
    "Detector",
    "DetectorState",
    "Quantity",
    "Verdict",
    "inspect",
    "record",
]

DetectorState: TypeAlias = dict[str, Any]
Quantity: TypeAlias = Literal["norm", "loss"]


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
        >>> from lightning_bigopt.gradients import NonFinite
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
        >>> from lightning_bigopt.gradients import NonFinite
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
        >>> from lightning_bigopt.gradients import NonFinite
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
        >>> from lightning_bigopt.gradients import NormSpike
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
