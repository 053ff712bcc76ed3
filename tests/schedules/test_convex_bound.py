"""The convex bound: figures of the paper, its sums, and a real convex problem."""

from __future__ import annotations

import math
import random

import pytest

from lightning_bigopt.schedules import (
    Constant,
    Cosine,
    Linear,
    Schedule,
    WarmupStableDecay,
)
from lightning_bigopt.schedules.convex_bound import (
    best_decay,
    convex_bound,
    cooldown_for_extension,
    learning_rate_ratio,
)
from lightning_bigopt.schedules.milestones import PiecewiseLinear


def wsd(cooldown: str, decay: str = "20%") -> WarmupStableDecay:
    return WarmupStableDecay(warmup=0, decay=decay, cooldown=cooldown)


def slow_terms(eta: list[float]) -> tuple[float, float]:
    """The two terms of the theorem, written as the sums of the paper, in quadratic time."""
    total = len(eta)
    first = 1 / (2 * sum(eta))
    second = sum(value**2 for value in eta) / sum(eta)
    for k in range(total - 1):
        tail = eta[k:]
        second += eta[k] / sum(eta[k + 1 :]) * sum(v**2 for v in tail) / sum(tail)
    return first, second / 2


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(), 2.913),
        (Cosine(end=0.1), 2.119),
        (wsd("linear"), 2.173),
        (wsd("1-sqrt"), 2.135),
        (Cosine(end=0.0), 2.063),
        (Linear(end=0.0), 2.006),
    ],
)
def test_bound_times_root_of_the_updates_is_that_of_the_paper(schedule, expected):
    assert convex_bound(schedule, 1000) * math.sqrt(1000) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("schedule", [Constant(), Cosine(end=0.1), wsd("linear"), wsd("1-sqrt")])
@pytest.mark.parametrize("updates", [1, 2, 7, 150])
def test_bound_agrees_with_the_sums_of_the_theorem(schedule, updates):
    first, second = slow_terms(schedule.values(updates))
    assert convex_bound(schedule, updates) == pytest.approx(2 * math.sqrt(first * second))


def test_ratio_of_learning_rates_is_that_of_the_paper():
    assert learning_rate_ratio(Linear(end=0.0), wsd("linear")) == pytest.approx(1.949, abs=5e-4)
    inverse = learning_rate_ratio(wsd("linear"), Linear(end=0.0))
    assert inverse == pytest.approx(1 / 1.949, abs=5e-4)


def test_factors_of_0_at_the_end_change_nothing():
    """Updates with a learning rate of 0 change no weight: the bound is that without them."""
    shorter = Linear(end=0.0)
    ends_early = PiecewiseLinear(points={0: 1.0, "50%": 0.0, "100%": 0.0})
    assert convex_bound(ends_early, 200) == pytest.approx(convex_bound(shorter, 100))


def test_extension_to_twice_the_length_needs_a_cooldown_of_63_percent():
    assert cooldown_for_extension(2) == pytest.approx(0.63, abs=0.005)
    assert cooldown_for_extension(1) == pytest.approx(0.2, abs=0.002)


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt", "exponential"])
@pytest.mark.parametrize("factor", [1.5, 2.5])
def test_extended_run_has_the_learning_rate_of_the_shorter_one(shape, factor):
    length = cooldown_for_extension(factor, cooldown=shape)
    rates = []
    for share, updates in ((0.2, 1000), (length, round(1000 * factor))):
        first, second = slow_terms(
            WarmupStableDecay(warmup=0, decay=share, cooldown=shape).values(updates)
        )
        rates.append(math.sqrt(first / second))
    assert rates[1] / rates[0] == pytest.approx(1.0, abs=2e-3)


def test_extension_that_no_cooldown_compensates_raises_with_the_learning_rate_to_use():
    assert cooldown_for_extension(3.7) > 0.9
    with pytest.raises(ValueError, match=r"at most 3\.\d+ .* got 8 .* rate by 0\.69"):
        cooldown_for_extension(8)


def test_search_stops_at_the_longest_cooldown():
    def factors(length, updates):
        return WarmupStableDecay(warmup=0, decay=length, cooldown="linear").values(updates)

    length, ratio = best_decay(factors, 2.0, decay=0.2, longest=0.5)
    assert length == 0.5
    assert 0.85 < ratio < 1.0


def test_the_bound_holds_for_subgradient_steps_on_a_convex_function():
    """|x| with noise of at most G = 1 from D = 1, at the best learning rate of each schedule."""
    for schedule in (Constant(), wsd("linear"), Linear(end=0.0)):
        factors = schedule.values(200)
        first, second = slow_terms(factors)
        rate = math.sqrt(first / second)
        losses = []
        for seed in range(300):
            draw = random.Random(seed)
            x = 1.0
            for factor in factors[:-1]:
                sign = math.copysign(1.0, x) if draw.random() < 0.75 else -math.copysign(1.0, x)
                x -= rate * factor * sign
            losses.append(0.5 * abs(x))  # the mean subgradient is half the sign
        assert sum(losses) / len(losses) < convex_bound(schedule, 200)


class Negative(Schedule):
    """A schedule whose factors become negative."""

    def factor(self, fraction: float) -> float:
        return 0.5 - fraction


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: convex_bound(Constant(), 0), "updates must be"),
        (lambda: convex_bound(1.0, 10), "schedule must be a Schedule"),
        (lambda: convex_bound(Constant(0.0), 10), "not all 0"),
        (lambda: convex_bound(Negative(), 10), "non-negative factors"),
        (lambda: learning_rate_ratio(Constant(), "linear"), "b must be a Schedule"),
        (lambda: cooldown_for_extension(0.5), "factor must be at least 1, got 0.5"),
        (lambda: cooldown_for_extension(float("nan")), "factor must be"),
        (lambda: cooldown_for_extension(2, decay=0.0), "decay must be"),
        (lambda: cooldown_for_extension(2, cooldown="step"), "cooldown must be"),
    ],
)
def test_invalid_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
