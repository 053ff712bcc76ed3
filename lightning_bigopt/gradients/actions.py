"""What is done about a rejected update: specifications, and the arithmetic that they need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_bigopt.gradients.rules.base import check_between, check_count

__all__ = ["Abort", "Action", "Backoff", "ClipToMedian", "Skip"]


class Action:
    """What is done about a rejected update. Subclasses are frozen dataclasses.

    Example:
        >>> isinstance(Skip(), Action)
        True
    """

    def initial_state(self) -> dict[str, Any]:
        """What it remembers before the first update."""
        return {}


@dataclass(frozen=True)
class Skip(Action):
    """Leaves the update out: parameters and optimizer state stay as they are, to the bit.

    Example:
        >>> Skip()
        Skip()
    """


@dataclass(frozen=True)
class ClipToMedian(Action):
    """Makes the update with its gradient scaled to the typical norm.

    Only for a finite norm that a norm detector rejects; every other rejection is skipped.

    Example:
        >>> ClipToMedian()
        ClipToMedian()
    """


@dataclass(frozen=True)
class Backoff(Action):
    """Lowers the learning rate after a rejection, and lets it recover.

    State: ``level``, the factor now; every rejection multiplies it by ``factor``, and every
    accepted update brings it back by an equal part, from ``factor`` to 1 in ``recover`` updates.

    Args:
        factor: By which the learning rate is multiplied, in (0, 1).
        recover: How many accepted updates lead from ``factor`` back to 1.

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
        check_between("factor", self.factor, low=0, high=1)
        check_count("recover", self.recover)

    def initial_state(self) -> dict[str, Any]:
        """The full learning rate."""
        return {"level": 1.0}

    def reject(self, state: dict[str, Any]) -> None:
        """Lowers the level."""
        state["level"] *= self.factor

    def accept(self, state: dict[str, Any]) -> None:
        """Brings the level back by one part."""
        state["level"] = min(1.0, state["level"] + (1.0 - self.factor) / self.recover)


@dataclass(frozen=True)
class Abort(Action):
    """Stops the run after so many rejections in a row.

    State: ``consecutive``, the rejections since the last accepted update.

    Args:
        after: How many rejections in a row end the run.

    Raises:
        ValueError: If ``after`` is not a positive integer.

    Example:
        >>> abort = Abort(after=2)
        >>> state = abort.initial_state()
        >>> abort.reject(state), abort.reject(state)
        (False, True)
    """

    after: int = 10

    def __post_init__(self) -> None:
        check_count("after", self.after)

    def initial_state(self) -> dict[str, Any]:
        """No rejections."""
        return {"consecutive": 0}

    def reject(self, state: dict[str, Any]) -> bool:
        """Counts a rejection, and says whether the run must end."""
        state["consecutive"] += 1
        return bool(state["consecutive"] >= self.after)

    def accept(self, state: dict[str, Any]) -> None:
        """Forgets the rejections."""
        state["consecutive"] = 0
