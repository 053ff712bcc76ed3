"""The interface of detectors of bad steps, and the decision whether an update is made.

A detector is a frozen specification that checks one number of an update. The caller stores and
saves its state, which contains plain lists and numbers. :func:`inspect` checks an update and
changes nothing; :func:`record` adds the outcome to the states, once for each update:

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

from lightning_bigopt.arguments import Specification

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
    """The reason for a rejected update.

    Args:
        detector: Class name of the detector.
        quantity: The quantity that it checked.
        value: Value of the quantity.
        limit: Largest accepted value; None if there is no such number.
        reason: Description in one sentence.

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


class Detector(Specification, ABC):
    """Checks one number of each update. Subclasses are frozen dataclasses.

    Attributes:
        quantity: The number: the gradient ``"norm"`` before clipping, or the ``"loss"``, the mean
            over the accumulation window and all processes.

    Example:
        >>> from lightning_bigopt.gradients import NonFinite
        >>> NonFinite().quantity
        'norm'
    """

    _used_in = "StepGuard([{}])"

    quantity: ClassVar[Quantity] = "norm"

    def initial_state(self) -> DetectorState:
        """Returns the state before the first update; it loads with ``weights_only=True``."""
        return {}

    def carry_over(self, state: DetectorState) -> DetectorState:
        """Returns the state for a resume with other arguments than those of the checkpoint.

        Args:
            state: The state of a detector of the same class with the arguments of the checkpoint.

        Returns:
            :meth:`initial_state`; a subclass may keep what does not depend on the arguments.
        """
        return self.initial_state()

    @abstractmethod
    def check(self, value: float, state: DetectorState) -> Verdict | None:
        """Returns the reason to reject an update, or None. Changes nothing."""

    @abstractmethod
    def accept(self, value: float, state: DetectorState) -> None:
        """Adds the value of an accepted update to the state."""

    @abstractmethod
    def reject(self, value: float, state: DetectorState) -> None:
        """Adds a value that this detector rejected to the state."""


def inspect(
    detectors: Sequence[Detector],
    states: Sequence[DetectorState],
    readings: Mapping[Quantity, float],
) -> Verdict | None:
    """Returns the verdict of the first detector that rejects the update. Changes nothing.

    Args:
        detectors: The detectors, in order.
        states: The state of each detector.
        readings: The norm, the loss, or both; a detector without its reading is skipped.

    Returns:
        The verdict, or None if no detector rejects the update; equal on all processes if the
        readings are.

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
    """Adds the outcome of an update to the states. Must be called once for each update.

    Values of a rejected update never enter a history of accepted values. The rejection is counted
    by those detectors that reject its value.

    Args:
        detectors: The detectors, in order.
        states: The state of each detector; changed in place.
        readings: The argument of :func:`inspect`.
        verdict: The result of :func:`inspect`, or None if the update was made anyway.

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
