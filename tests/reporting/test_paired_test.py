"""The paired t-test against scipy, and the detectable difference against simulation and tables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import nct, t, ttest_rel

from lightning_bigopt.reporting.paired_test import (
    detectable_difference,
    paired_test,
    pairs_needed,
)


def samples(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("count", [2, 3, 8, 40])
def test_statistic_p_value_and_interval_are_those_of_scipy(count: int):
    first = samples(count)
    second = first + 0.3 * samples(count, seed=1) + 0.1
    found = paired_test(first.tolist(), second.tolist())
    oracle = ttest_rel(second, first)
    assert found.count == count
    assert found.statistic == pytest.approx(oracle.statistic, rel=1e-12)
    assert found.p_value == pytest.approx(oracle.pvalue, rel=1e-12)
    assert found.interval == pytest.approx(tuple(oracle.confidence_interval(0.95)), rel=1e-12)
    assert found.difference == pytest.approx(np.mean(second - first), rel=1e-12)
    assert found.deviation == pytest.approx(np.std(second - first, ddof=1), rel=1e-12)
    assert found.is_defined
    assert found.is_significant == (oracle.pvalue < 0.05)


def test_exchanged_sides_have_the_opposite_difference():
    first, second = samples(2, 6).tolist()
    one, other = paired_test(first, second), paired_test(second, first)
    assert other.difference == pytest.approx(-one.difference, rel=1e-12)
    assert other.p_value == pytest.approx(one.p_value, rel=1e-12)
    assert other.interval == pytest.approx((-one.interval[1], -one.interval[0]), rel=1e-12)


# Effect sizes d at which a two-sided paired t-test with n pairs has the power 0.8 at the level
# 0.05: G*Power and the tables of Cohen (1988) give n = 34 for 0.5, 15 for 0.8 and 199 for 0.2.
@pytest.mark.parametrize(("effect", "count"), [(0.5, 34), (0.8, 15), (0.2, 199)])
def test_pairs_needed_are_those_of_tables(effect: float, count: int):
    assert pairs_needed(1.0, effect) == count
    assert detectable_difference(1.0, count) <= effect < detectable_difference(1.0, count - 1)


@pytest.mark.parametrize("count", [3, 5, 8, 20, 300])
@pytest.mark.parametrize(("power", "alpha"), [(0.8, 0.05), (0.9, 0.01), (0.5, 0.05)])
def test_power_at_the_detectable_difference_by_the_noncentral_t(
    count: int, power: float, alpha: float
):
    found = detectable_difference(2.0, count, power=power, alpha=alpha)
    critical, shift = t.isf(alpha / 2, count - 1), found / 2.0 * math.sqrt(count)
    lower = nct.cdf(-critical, count - 1, shift)
    beyond = nct.sf(critical, count - 1, shift) + (0.0 if math.isnan(lower) else lower)
    assert beyond == pytest.approx(power, abs=1e-6)


@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_simulated_power_is_the_claimed_one(count: int):
    trials, deviation = 40_000, 0.3
    shift = detectable_difference(deviation, count)
    differences = shift + deviation * samples(trials, count, seed=count)
    statistic = differences.mean(1) / differences.std(1, ddof=1) * math.sqrt(count)
    power = np.mean(np.abs(statistic) > t.isf(0.025, count - 1))
    assert power == pytest.approx(0.8, abs=4 * math.sqrt(0.8 * 0.2 / trials))


def test_detectable_difference_is_proportional_to_the_deviation():
    once, thrice = detectable_difference(0.1, 8), detectable_difference(0.3, 8)
    assert thrice == pytest.approx(3 * once, rel=1e-9)
    found = paired_test(*(x := samples(2, 8).tolist()))
    spread = float(np.std(np.subtract(x[1], x[0]), ddof=1))
    assert found.detectable == pytest.approx(detectable_difference(spread, 8), rel=1e-9)


@pytest.mark.parametrize("shift", [0.0, 0.25])
def test_equal_differences_have_no_test(shift: float):
    first = [2.0, 2.5, 3.25]
    found = paired_test(first, [x + shift for x in first])
    assert not found.is_defined
    assert not found.is_significant
    assert math.isnan(found.p_value)
    assert found.difference == shift
    assert found.interval == (shift, shift)


def test_differences_that_are_equal_up_to_rounding_have_no_test():
    first = [1.1, 2.2, 3.3, 4.7]
    assert not paired_test(first, [x + 0.1 for x in first]).is_defined
    # Losses in float32, whose sums depend on the order: p would be about 1e-16.
    assert not paired_test(first, [x + 0.1 + 2e-7 * x for x in first]).is_defined
    assert paired_test(first, [x + 0.1 + 1e-5 * x for x in first]).is_defined


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([1.0, 2.0], [1.0], "second must have as many numbers as first, got 1 and 2"),
        ([1.0], [2.0], "number of pairs must be an integer of at least 2, got 1; use more seeds"),
        ([1.0, math.nan], [1.0, 2.0], "first must be finite, got nan"),
        ([1.0, 2.0], [math.inf, 2.0], "second must be finite, got inf"),
    ],
)
def test_wrong_pairs_raise(first: list[float], second: list[float], message: str):
    with pytest.raises(ValueError, match=message):
        paired_test(first, second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deviation": 0.0, "count": 8}, "deviation must be positive"),
        ({"deviation": 1.0, "count": 1}, "count must be a number of pairs of at least 2"),
        ({"deviation": 1.0, "count": 8, "power": 1.0}, r"power must be in \[0.5, 1\)"),
        ({"deviation": 1.0, "count": 8, "alpha": 0.8}, r"power must be above alpha, 0.8, got 0.8"),
        ({"deviation": 1.0, "count": 8, "alpha": 0.0}, r"alpha must be in \(0, 1\)"),
    ],
)
def test_wrong_options_raise(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        detectable_difference(**options)


def test_difference_that_no_number_of_pairs_can_show_raises():
    with pytest.raises(ValueError, match="difference must be one that 100,000 pairs can show"):
        pairs_needed(1.0, 1e-6)
