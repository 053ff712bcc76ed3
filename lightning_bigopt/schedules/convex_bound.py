"""A bound on the loss of a schedule from convex optimization, which needs no training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lightning_bigopt.checks import check_between, check_choice, check_count, check_number, shown
from lightning_bigopt.schedules.base import Schedule, check_schedule
from lightning_bigopt.schedules.decays import Constant
from lightning_bigopt.schedules.shapes import CooldownShape

__all__ = ["best_decay", "convex_bound", "cooldown_for_extension", "learning_rate_ratio"]

_UPDATES = 1000


def convex_bound(schedule: Schedule, updates: int) -> float:
    r"""Computes the bound on the final suboptimality of SGD at the best learning rate.

    For a convex loss whose gradients have norm :math:`G` at most, with updates
    :math:`\gamma \eta_t` and weights at a distance :math:`D` from the optimum at the start, the
    loss after update :math:`T` exceeds the minimum by at most
    :math:`T_1 D^2 / \gamma + \gamma T_2 G^2` in expectation, where

    .. math::
        T_1 = \frac{1}{2 \sum_t \eta_t}, \quad
        T_2 = \frac12 \Bigl( \frac{\sum_t \eta_t^2}{\sum_t \eta_t}
            + \sum_{k < T} \frac{\eta_k}{\sum_{t > k} \eta_t}
            \frac{\sum_{t \ge k} \eta_t^2}{\sum_{t \ge k} \eta_t} \Bigr).

    The best learning rate is :math:`\gamma^* = \sqrt{T_1 / T_2}\, D / G`, and the bound is then
    :math:`2 \sqrt{T_1 T_2}\, D G`. Its order of schedules agrees with that of language models in
    many cases, although their loss is not convex. It does not know effects of instability, so that
    it never favors a warm-up.

    Args:
        schedule: The schedule.
        updates: Number of updates T of the run.

    Returns:
        The bound in units of D·G. It falls with the square root of ``updates``.

    Raises:
        ValueError: If ``updates`` is not positive, or a factor is negative, or all are 0.

    Example:
        >>> from lightning_bigopt.schedules import Constant, Linear
        >>> [round(convex_bound(s, 1000) * 1000**0.5, 3) for s in (Constant(), Linear(end=0.0))]
        [2.913, 2.006]

    References:
        Schaipp et al., "The Surprising Agreement Between Convex Optimization Theory and
        Learning-Rate Scheduling for Large Model Training", ICML 2025, Theorem 3.1 and Cor. 3.2.
    """
    distance, noise = _terms(_factors("schedule", schedule, updates))
    return 2.0 * math.sqrt(distance * noise)


def learning_rate_ratio(a: Schedule, b: Schedule, *, updates: int = _UPDATES) -> float:
    """Returns the best learning rate of one schedule divided by that of another, by the bound.

    Use it to compare schedules without a search for each of them: each at its own best learning
    rate.

    Args:
        a: The schedule whose learning rate is wanted.
        b: The schedule whose best learning rate is known.
        updates: Number of updates of both runs.

    Raises:
        ValueError: As for :func:`convex_bound`.

    Example:
        >>> from lightning_bigopt.schedules import Linear, WarmupStableDecay
        >>> wsd = WarmupStableDecay(warmup=0, decay="20%", cooldown="linear")
        >>> round(learning_rate_ratio(Linear(end=0.0), wsd), 3)
        1.949

    References:
        Schaipp et al., ICML 2025, Sec. 5.2 (see :func:`convex_bound`).
    """
    rates = [_best_rate(_factors(name, s, updates)) for name, s in (("a", a), ("b", b))]
    return rates[0] / rates[1]


def cooldown_for_extension(
    factor: float, *, decay: float = 0.2, cooldown: CooldownShape = "linear"
) -> float:
    """Returns the length of the cooldown with which a longer run keeps its learning rate.

    The best learning rate of a schedule falls with the length of the run, and rises with the length
    of its cooldown. If a run with a constant learning rate and a final cooldown is extended, a
    longer cooldown compensates for the length.

    Args:
        factor: New length of the run divided by the length for which the learning rate was chosen,
            at least 1.
        decay: Length of the cooldown in the shorter run, as a fraction of it, in (0, 1].
        cooldown: Shape of the cooldown: ``"linear"``, ``"cosine"``, ``"1-sqrt"`` or
            ``"exponential"``.

    Returns:
        Length of the cooldown as a fraction of the longer run.

    Raises:
        ValueError: If no cooldown is long enough, or an argument is out of range.

    Example:
        >>> round(cooldown_for_extension(2), 2)
        0.63

    References:
        Schaipp et al., ICML 2025, Sec. 5.1 (see :func:`convex_bound`). With 124M parameters their
        extended run ended at 2.9037 with a cooldown of 20 %, and at 2.8878 with 60 %.
    """
    check_number("factor", factor, hint="write 2.0")
    if not 1.0 <= factor < math.inf:
        raise ValueError(
            f"factor must be at least 1, got {shown(factor)}; divide the new length of the run by "
            "the old one"
        )
    check_between("decay", decay, 0, 1, ends="(]", hint="write 0.2")
    check_choice("cooldown", cooldown, CooldownShape)

    def factors(length: float, updates: int) -> list[float]:
        trapezoid = Constant().with_cooldown(1.0 - length, over=length, shape=cooldown)
        return trapezoid.values(updates)

    largest = _largest(factors, decay)
    if factor > largest:
        raise ValueError(
            f"factor must be at most {largest:.2f} for a cooldown that keeps the learning rate, "
            f"got {shown(factor)} with decay={shown(decay)}; use a cooldown over the whole run, "
            f"and multiply the learning rate by {math.sqrt(largest / factor):.2f}"
        )
    return best_decay(factors, factor, decay=decay)[0]


def best_decay(
    factors: Callable[[float, int], Sequence[float]],
    factor: float,
    *,
    decay: float,
    longest: float = 1.0,
    updates: int = _UPDATES,
) -> tuple[float, float]:
    """Finds the cooldown whose best learning rate is that of the shorter run.

    Args:
        factors: Returns the factors of the updates for a length of the cooldown and a number of
            updates.
        factor: Length of the longer run divided by that of the shorter one.
        decay: Length of the cooldown of the shorter run, as a fraction of it.
        longest: Largest length of the cooldown, as a fraction of the longer run.
        updates: Updates of the shorter run in the computation, which hardly depends on it.

    Returns:
        The length as a fraction of the longer run, and the best learning rate with it divided by
        that of the shorter run: 1, or less if ``longest`` was too short.
    """
    target = _best_rate(factors(decay, updates))
    longer = round(factor * updates)

    def ratio(length: float) -> float:
        return _best_rate(factors(length, longer)) / target

    if (reached := ratio(longest)) <= 1.0:
        return longest, reached
    low, high = 0.0, longest
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) < 1.0 else (low, middle)
    return high, 1.0


def _largest(factors: Callable[[float, int], Sequence[float]], decay: float) -> float:
    """Returns the factor of length at which the cooldown takes the whole run."""
    best = [_best_rate(factors(length, _UPDATES)) for length in (1.0, decay)]
    return (best[0] / best[1]) ** 2  # the best learning rate falls with the root of the length


def _factors(name: str, schedule: Schedule, updates: int) -> list[float]:
    check_schedule(name, schedule)
    check_count("updates", updates, hint="write 1000")
    factors = schedule.values(updates)
    if min(factors) < 0 or not max(factors) > 0:
        raise ValueError(
            f"{name} must have non-negative factors that are not all 0, got factors from "
            f"{min(factors)} to {max(factors)} with updates={updates}; pass a schedule such as "
            "Linear(end=0.0), or more updates"
        )
    return factors


def _best_rate(factors: Sequence[float]) -> float:
    distance, noise = _terms(factors)
    return math.sqrt(distance / noise)


def _terms(factors: Sequence[float]) -> tuple[float, float]:
    """Returns the terms T1 and T2 of the bound."""
    remaining = squares = interrupted = 0.0  # sums over the updates from the current one on
    for factor in reversed(factors):
        later = remaining
        remaining += factor
        squares += factor * factor
        if later > 0:  # updates after the last factor above 0 change no weight
            interrupted += factor / later * squares / remaining
    return 0.5 / remaining, 0.5 * (squares / remaining + interrupted)
