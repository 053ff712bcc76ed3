"""The interface of averages of the weights, and their state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_bigopt.arguments import Specification
from lightning_bigopt.averaging.weights import Weights
from lightning_bigopt.durations.duration import Duration
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.durations.progress import Progress

__all__ = ["Average", "AverageState"]


@dataclass(kw_only=True, eq=False)
class AverageState:
    """What an average keeps between updates.

    Args:
        copies: Copies of weights, or means of them, with the names of the parameters.
        numbers: Plain numbers and lists of numbers.

    Example:
        >>> AverageState().copies
        []
    """

    copies: list[Weights] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)


class Average(Specification, ABC):
    """Base class of averages of the weights, which are specifications for ``ModelAveraging``.

    Subclasses are frozen dataclasses. The caller keeps the state, and calls :meth:`update` after
    each update of the run, also after one that was skipped: it counts as consumed, and repeats the
    weights before it.

    Example:
        >>> from lightning_bigopt import EMA
        >>> isinstance(EMA(half_life="1%"), Average)
        True
    """

    _used_in = "ModelAveraging({})"

    @property
    @abstractmethod
    def duration(self) -> Duration:
        """The length that the average remembers, whose unit must be counted."""

    @property
    def durations(self) -> tuple[Duration, ...]:
        """All durations of the average."""
        return (self.duration,)

    @property
    def needs_horizon(self) -> bool:
        """Whether the length of the run must be known."""
        return any(duration.unit == "fraction" for duration in self.durations)

    def check(self, horizon: Horizon | None) -> None:
        """Raises a ValueError if the average does not fit the budget; called at train start."""

    def initial_state(self) -> AverageState:
        """Returns the state before the first update."""
        return AverageState()

    @abstractmethod
    def update(
        self,
        state: AverageState,
        weights: Mapping[str, Tensor],
        progress: Progress,
        horizon: Horizon | None,
    ) -> None:
        """Adds the weights after an update to the state.

        Args:
            state: The state; changed in place.
            weights: The current weights; the state must contain copies.
            progress: The amounts consumed up to the end of the update.
            horizon: The budget of the run; None if it is unknown.
        """

    @abstractmethod
    def value(
        self, state: AverageState, weights: Mapping[str, Tensor], progress: Progress
    ) -> Mapping[str, Tensor] | None:
        """Returns the average; None if it equals the current weights, as before its start.

        Args:
            state: The state; not changed.
            weights: The current weights.
            progress: The amounts consumed.
        """

    def count_from(self, state: AverageState, progress: Progress) -> None:
        """Counts from ``progress`` on: a new state, or one of another budget.

        Amounts in percent refer to the budget, which may change with a second fit or a resume.
        """
