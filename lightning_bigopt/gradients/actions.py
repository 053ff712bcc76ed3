"""Specifications of the actions that ``StepGuard`` takes after a rejected update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_bigopt.arguments import Specification, explain_arguments
from lightning_bigopt.checks import check_between, check_count
from lightning_bigopt.removed import RemovedAttribute

__all__ = ["Abort", "Action", "Backoff", "ClipToMedian", "Skip"]


class Action(Specification):
    """Base class of the actions, which are specifications for ``StepGuard``.

    ``StepGuard`` implements the four actions of this module; other subclasses have no effect.

    Example:
        >>> isinstance(Skip(), Action)
        True
    """

    _used_in = "StepGuard(actions=[{}])"

    initial_state: Any = RemovedAttribute("0.2", "only Backoff has a state")


@explain_arguments
@dataclass(frozen=True)
class Skip(Action):
    """Skips the update: parameters and optimizer state do not change.

    ``StepGuard`` also skips without this action, unless :class:`ClipToMedian` handles the
    rejection.

    Example:
        >>> Skip()
        Skip()
    """


@explain_arguments
@dataclass(frozen=True)
class ClipToMedian(Action):
    """Scales the gradient to the typical norm instead of skipping the update.

    Only a finite norm that :class:`NormSpike` rejects is scaled; every other rejected update is
    skipped.

    Example:
        >>> ClipToMedian()
        ClipToMedian()
    """


@explain_arguments
@dataclass(frozen=True)
class Backoff(Action):
    """Lowers the learning rate after a rejection and raises it again over accepted updates.

    The state holds ``level``, the current factor on the learning rate. A rejection multiplies it
    by ``factor``; each accepted update adds ``(1 - factor) / recover``, up to 1.

    Args:
        factor: Multiplies the learning rate at each rejection, in (0, 1).
        recover: Number of accepted updates from ``factor`` back to 1.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> backoff = Backoff(factor=0.5, recover=2)
        >>> state = backoff.initial_state()
        >>> backoff.reject(state)
        >>> levels = [state["level"]]
        >>> for _ in range(3):
        ...     backoff.accept(state)
        ...     levels.append(state["level"])
        >>> levels
        [0.5, 0.75, 1.0, 1.0]
    """

    factor: float = 0.5
    recover: int = 100

    def __post_init__(self) -> None:
        check_between("factor", self.factor, 0, 1)
        check_count("recover", self.recover)

    def initial_state(self) -> dict[str, Any]:
        """Returns the state at the full learning rate: level 1."""
        return {"level": 1.0}

    def reject(self, state: dict[str, Any]) -> None:
        """Lowers the level after a rejection."""
        state["level"] *= self.factor

    def accept(self, state: dict[str, Any]) -> None:
        """Raises the level after an accepted update."""
        state["level"] = min(1.0, state["level"] + (1.0 - self.factor) / self.recover)


@explain_arguments
@dataclass(frozen=True)
class Abort(Action):
    """Ends the run with an error after several rejections in a row, also with a ``RollBack``.

    ``StepGuard`` counts them. The smallest of several limits applies, including its own
    ``max_consecutive``.

    Args:
        after: Number of rejections in a row that end the run.

    Raises:
        ValueError: If ``after`` is not a positive integer.

    Example:
        >>> Abort(after=2)
        Abort(after=2)
    """

    after: int = 10

    accept = RemovedAttribute("0.2", "StepGuard counts the rejections in a row")
    reject = RemovedAttribute("0.2", "StepGuard counts the rejections in a row")

    def __post_init__(self) -> None:
        check_count("after", self.after)
