"""The measured loss of one run, with the learning rate of each of its updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import check_count, shown
from lightning_bigopt.planning.multi_power_law import Array, check_rates, numbers, whole_numbers
from lightning_bigopt.type_checks import check_instance

__all__ = ["FEWEST_LOSSES", "LossCurve", "interpolated_rates"]

FEWEST_LOSSES = 8
"""Losses of a run with which a law can be fitted."""

_STEP, _CONSTANT = 0.1, 1e-3  # changes of the learning rate as fractions of its peak


@explain_arguments
@dataclass(frozen=True, kw_only=True)
class LossCurve:
    """The losses of one run, and the learning rate of each of its updates.

    Args:
        learning_rates: Learning rate of each update, from the first on, of one parameter group.
        updates: Numbers of updates after which the losses were measured, ascending.
        losses: The losses, as many as ``updates``.
        name: Name of the run in messages.

    Raises:
        ValueError: If lengths differ, updates do not ascend or lie outside the run, or a value is
            not finite.

    Example:
        >>> curve = LossCurve(learning_rates=[1e-3, 1e-3, 5e-4], updates=[1, 3], losses=[4.0, 3.5])
        >>> curve.peak, curve.warmup
        (0.001, 1)
    """

    learning_rates: Sequence[float]
    updates: Sequence[int]
    losses: Sequence[float]
    name: str = "run"

    def __post_init__(self) -> None:
        check_instance("name", self.name, str, hint="write 'constant'")
        rates = check_rates(self.learning_rates, of=f" of {self.name}")
        hint = "pass one loss for each number of updates, and leave out a run that has diverged"
        updates = whole_numbers(f"updates of {self.name}", self.updates, hint=hint)
        losses = numbers(f"losses of {self.name}", self.losses, hint=hint)
        if updates.size != losses.size:
            raise ValueError(
                f"losses must be as many as updates, got {shown(self.losses)} and updates "
                f"{shown(self.updates)} in {self.name}; pass one loss for each"
            )
        if (np.diff(updates) <= 0).any() or not 1 <= updates[0] <= rates.size:
            raise ValueError(
                f"updates must ascend from 1 to at most {rates.size}, the length of "
                f"learning_rates, got {shown(self.updates)} in {self.name}; pass the number of "
                "updates before each loss"
            )
        if updates[-1] > rates.size:
            raise ValueError(
                f"updates must be at most {rates.size}, the length of learning_rates, got "
                f"{shown(self.updates)} with learning_rates {shown(self.learning_rates)} in "
                f"{self.name}; pass the learning rate of each update"
            )
        for name, values in {"learning_rates": rates, "losses": losses}.items():
            object.__setattr__(self, name, tuple(map(float, values)))
        object.__setattr__(self, "updates", tuple(updates.tolist()))

    @classmethod
    def from_points(
        cls,
        *,
        steps: Sequence[int],
        learning_rates: Sequence[float],
        updates: Sequence[int],
        losses: Sequence[float],
        warmup: int = 0,
        name: str = "run",
    ) -> LossCurve:
        """Makes a curve from learning rates that are known at some updates only.

        Between two known updates the learning rate is interpolated linearly. A change of more than
        10 % of the peak between two constant parts counts as a step of the schedule at the later of
        the two updates.

        Args:
            steps: Indices, from 0, of the updates with a known learning rate, ascending.
            learning_rates: Their learning rates.
            updates: As for the class.
            losses: As for the class.
            warmup: Updates of a linear warm-up from 0 to the first learning rate, which ends at the
                first of ``steps``; 0 if the first learning rate holds before it.
            name: As for the class.
        """
        known = check_rates(learning_rates, of=f" of {name}")
        places = whole_numbers("steps", steps, hint="pass the index of each update, from 0")
        if places.shape != known.shape or (np.diff(places) <= 0).any() or places[0] < 0:
            raise ValueError(
                "steps must ascend from 0, one for each learning rate, got "
                f"{shown(places[:3].tolist())} for {known.size} learning rates; pass them in order"
            )
        check_count("warmup", warmup, minimum=0, of="updates", hint="write 0")
        ends = whole_numbers(
            f"updates of {name}", updates, hint="pass the number of updates before each loss"
        )
        length = max(int(places[-1]) + 1, int(ends.max()))
        rates = interpolated_rates(places, known, length)
        if warmup:
            start = max(int(places[0]) - warmup, 0)
            rise = np.arange(start, places[0])
            rates[:start] = 0.0
            rates[rise] = known[0] * (rise - start) / max(int(places[0]) - start, 1)
        return cls(
            learning_rates=rates.tolist(), updates=ends.tolist(), losses=list(losses), name=name
        )

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        return max(self.learning_rates)

    @property
    def warmup(self) -> int:
        """Number of updates up to the first with the highest learning rate, included."""
        return self.learning_rates.index(self.peak) + 1

    def binned(self, points: int, *, start: int = 0) -> tuple[Array, Array]:
        """Returns the losses after the warm-up as means over bins of equal numbers of losses.

        Args:
            points: Largest number of bins.
            start: Number of updates before the first loss that counts, if the warm-up is shorter.

        Returns:
            The mean of the updates of each bin, rounded, and the mean of its losses.

        Raises:
            ValueError: If fewer than 8 losses lie after the warm-up.
        """
        updates, losses = self.counted(start=start)
        bins = np.array_split(np.arange(updates.size), min(points, updates.size))
        means = [(updates[members].mean(), losses[members].mean()) for members in bins]
        found = np.asarray(means)
        return np.rint(found[:, 0]).astype(np.int64), found[:, 1]

    def counted(self, *, start: int = 0) -> tuple[NDArray[np.int64], Array]:
        """Returns the losses after the warm-up, to which a law can be fitted.

        Args:
            start: As for :meth:`binned`.

        Returns:
            Numbers of updates and losses.

        Raises:
            ValueError: If fewer than 8 losses lie after the warm-up.
        """
        updates, losses = np.asarray(self.updates), np.asarray(self.losses)
        kept = updates >= max(self.warmup, start)
        updates, losses = updates[kept], losses[kept]
        if updates.size < FEWEST_LOSSES:
            raise ValueError(
                f"runs must have at least {FEWEST_LOSSES} losses after the warm-up, got "
                f"{updates.size} in {self.name} after update {max(self.warmup, start) - 1:,}; log "
                "the loss more often, or train longer"
            )
        return updates, losses


def interpolated_rates(
    places: Sequence[int] | NDArray[np.int64], known: Sequence[float] | Array, length: int
) -> Array:
    """Returns the learning rate of each update of a run from those of some updates.

    Args:
        places: Indices of the updates with a known learning rate, from 0, ascending.
        known: Their learning rates. A change of more than 10 % of the highest one between two
            constant parts is a step at the later update; any other is linear.
        length: Number of updates of the run.

    Example:
        >>> interpolated_rates([0, 4], [0.0, 1.0], 6).tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """
    places, known = np.asarray(places), np.asarray(known)
    rates = np.asarray(np.interp(np.arange(length), places, known), dtype=np.float64)
    changes = np.abs(np.diff(known)) / known.max()
    around = np.concatenate([[np.inf], changes, [np.inf]])  # the ends are no constant parts
    is_between = np.maximum(around[:-2], around[2:]) < _CONSTANT
    for index in np.flatnonzero((changes > _STEP) & is_between):
        rates[places[index] + 1 : places[index + 1]] = known[index]
    return rates
