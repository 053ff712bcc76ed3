"""The Multi-Power Law: the loss of a run as a function of its learning rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import check_non_negative, check_positive, shown

__all__ = ["Array", "MultiPowerLaw", "RateHistory", "check_rates", "numbers", "whole_numbers"]

Array = NDArray[np.float64]

_LARGEST = 10**9  # numbers in a list; a range may have more than any memory


@explain_arguments
@dataclass(frozen=True, kw_only=True)
class MultiPowerLaw:
    r"""The loss after any update, from the learning rates of the updates before.

    .. math::
        L(t) = L_0 + A\, S(t)^{-\alpha}
            - B \sum_{k \le t} (\eta_{k-1} - \eta_k)
              \Bigl(1 - \bigl(1 + C\, \eta_k^{-\gamma} S_k(t)\bigr)^{-\beta}\Bigr)

    where :math:`\eta_k` is the learning rate of update k, :math:`S(t)` the sum of all learning
    rates up to update t, and :math:`S_k(t)` the sum from update k on. The first two terms are the
    loss at a constant learning rate, the third is the drop of the loss when the learning rate
    decays. The law describes a run after its warm-up, with a constant batch size.

    Args:
        floor: Loss :math:`L_0` after infinitely many updates at a constant learning rate.
        scale: Coefficient :math:`A`.
        alpha: Exponent :math:`\alpha`.
        drop: Coefficient :math:`B`: loss that a full decay gains in the end, per unit of the
            learning rate.
        drop_speed: Coefficient :math:`C`.
        beta: Exponent :math:`\beta` of the drop.
        gamma: Exponent :math:`\gamma` of the learning rate in the drop.

    Raises:
        ValueError: If a value is negative or not finite, or an exponent is 0.

    Example:
        >>> law = MultiPowerLaw(
        ...     floor=3.04,
        ...     scale=0.525,
        ...     alpha=0.508,
        ...     drop=364,
        ...     drop_speed=2.07,
        ...     beta=0.58,
        ...     gamma=0.64,
        ... )
        >>> constant, decayed = [3e-4] * 20_000, [3e-4] * 16_000 + [3e-5] * 4_000
        >>> [round(float(law.losses(rates, [20_000])[0]), 3) for rates in (constant, decayed)]
        [3.251, 3.18]

    References:
        Luo et al., "A Multi-Power Law for Loss Curve Prediction Across Learning Rate Schedules",
        ICLR 2025, Eq. 1 and 2.
    """

    floor: float
    scale: float
    alpha: float
    drop: float
    drop_speed: float
    beta: float
    gamma: float

    def __post_init__(self) -> None:
        for name in ("floor", "scale", "drop", "drop_speed"):
            check_non_negative(name, getattr(self, name))
        for name in ("alpha", "beta", "gamma"):
            check_positive(name, getattr(self, name))

    def losses(self, learning_rates: Sequence[float] | Array, updates: Sequence[int]) -> Array:
        """Returns the loss after each of some numbers of updates.

        Args:
            learning_rates: Learning rate of each update of the run, from the first on.
            updates: Numbers of updates, each from 1 to the length of ``learning_rates``.

        Returns:
            Losses, float64, as many as ``updates``.

        Raises:
            ValueError: If a learning rate is negative or not finite, all up to one of ``updates``
                are 0, or a number of updates is outside the run.
        """
        return self.losses_of(RateHistory(learning_rates, updates))

    def losses_of(self, history: RateHistory) -> Array:
        """Returns the losses of a history, whose sums are computed once for many laws."""
        falls = history.falls
        with np.errstate(divide="ignore", over="ignore"):
            speeds = self.drop_speed * history.rates**-self.gamma  # infinite at a rate of 0
            reached = np.zeros_like(history.since)
            np.multiply(history.since, speeds, out=reached, where=history.since > 0)
            drops = -np.expm1(-self.beta * np.log1p(reached))
            found: Array = self.floor + self.scale * history.sums**-self.alpha
        return found - self.drop * (drops @ falls)


class RateHistory:
    """The sums of learning rates that the law needs, for some updates of a run.

    Decays of neighboring updates are grouped, so that the cost does not grow with the square of the
    length of the run.

    Args:
        learning_rates: Learning rate of each update of the run.
        updates: Numbers of updates after which the loss is wanted.
        groups: Number of groups, each with an equal share of all changes.

    Attributes:
        sums: Sum of the learning rates of all updates, shape ``(len(updates),)``.
        falls: Fall of the learning rate in each group of decays, shape ``(groups,)``.
        rates: Learning rate after the fall, shape ``(groups,)``.
        since: Sum of the learning rates since the fall, 0 before it, shape
            ``(len(updates), groups)``.
    """

    def __init__(
        self, learning_rates: Sequence[float] | Array, updates: Sequence[int], *, groups: int = 256
    ) -> None:
        rates = check_rates(learning_rates)
        ends = whole_numbers("updates", updates, hint="write [1000, 2000]")
        if not (ends.min() >= 1 and ends.max() <= rates.size):
            raise ValueError(
                f"updates must be from 1 to {rates.size}, the length of the run, got "
                f"{ends.min()} to {ends.max()}; pass the learning rates of all updates"
            )
        totals = np.concatenate([[0.0], np.cumsum(rates)])
        # The rises of the warm-up are no negative decays: the law begins at the peak.
        peak = int(np.argmax(rates))
        change = -np.diff(rates)
        change[:peak] = 0.0
        places = np.flatnonzero(change)
        change = change[places]
        sizes = np.abs(change)
        # A new group begins after each share of all changes, and where a decay turns into a rise.
        shares = np.cumsum(sizes) / max(sizes.sum(), 1e-300)
        keys = np.arange(1, sizes.size + 1)
        if sizes.size > groups:
            keys = np.ceil(groups * shares) * np.sign(change)
        starts = np.flatnonzero(np.concatenate([[True], np.diff(keys) != 0])[: keys.size])

        def mean(values: Array) -> Array:
            """Returns the mean of each group, weighted by the changes."""
            if not starts.size:
                return np.zeros(0)
            found: Array = np.add.reduceat(values * sizes, starts) / np.add.reduceat(sizes, starts)
            return found

        self.sums = totals[ends]
        self.falls = np.add.reduceat(change, starts) if starts.size else np.zeros(0)
        self.rates = mean(rates[places + 1])
        before = mean(totals[places + 1])
        self.since = np.maximum(self.sums[:, None] - before[None, :], 0.0)
        if not (self.sums > 0).all():
            raise ValueError(
                "learning_rates must be above 0 before the first of updates, got only 0; leave out "
                "the losses before the first update"
            )


def numbers(name: str, values: Any, *, hint: str) -> Array:
    """Returns a list of numbers as an array; raises unless it is one, not empty and finite."""
    is_list = isinstance(values, (list, tuple))
    if isinstance(values, range):
        is_list = abs(values.stop - values.start) < _LARGEST
    if isinstance(values, np.ndarray):
        is_list = values.ndim == 1 and not isinstance(values, np.ma.MaskedArray)
    if is_list and getattr(values, "dtype", np.dtype("O")).kind not in "iuf":
        is_list = all(isinstance(v, Real) and not isinstance(v, bool | np.bool_) for v in values)
    if is_list:
        try:
            found = np.asarray(values, dtype=np.float64)
        except (OverflowError, ValueError):  # an int that no float holds
            found = np.zeros(0)
        if found.ndim == 1 and found.size and np.isfinite(found).all():
            return found
    raise ValueError(
        f"{name} must be a list of finite numbers, at least one, got {shown(values)}; {hint}"
    )


def whole_numbers(name: str, values: Any, *, hint: str) -> NDArray[np.int64]:
    """Returns a list of whole numbers as an array; raises unless it is one and not empty."""
    found = numbers(name, values, hint=hint)
    if (found != np.rint(found)).any() or np.abs(found).max() > _LARGEST:
        raise ValueError(
            f"{name} must be a list of whole numbers up to {_LARGEST:,}, got {shown(values)}; "
            f"{hint}"
        )
    return found.astype(np.int64)


def check_rates(learning_rates: Sequence[float] | Array, *, of: str = "") -> Array:
    """Returns learning rates as an array; raises unless they are finite and not negative.

    Args:
        learning_rates: The learning rates.
        of: Whose they are, for the error, such as ``" of run a"``.
    """
    hint = "pass the learning rate of each update, as schedule.values(updates, base=3e-4)"
    rates = numbers(f"learning_rates{of}", learning_rates, hint=hint)
    if rates.min() < 0 or not rates.max() > 0:
        raise ValueError(
            f"learning_rates{of} must be non-negative and not all 0, got values from "
            f"{rates.min()} to {rates.max()}; pass the values that the run used"
        )
    return rates
