"""The curve of a range test: smoothing, slope, valley and suggestion."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bigopt.tuning.curve import RangeTest, exponential_rates, smooth, steepest, valley

LOSSES = st.lists(st.floats(0.1, 10.0), min_size=3, max_size=9)


@given(st.lists(st.floats(-5.0, 5.0), min_size=1, max_size=30), st.sampled_from([0.0, 0.5, 0.98]))
def test_smoothing_is_the_bias_corrected_average_of_adam(losses: list[float], decay: float):
    average = 0.0
    for t, (loss, found) in enumerate(zip(losses, smooth(losses, decay), strict=True), start=1):
        average = decay * average + (1 - decay) * loss
        assert found == pytest.approx(average / (1 - decay**t), rel=1e-9, abs=1e-9)


def test_non_finite_losses_are_not_averaged():
    assert smooth([1.0, math.nan, math.inf, 3.0], 0.5)[-1] == smooth([1.0, 3.0], 0.5)[-1]
    assert math.isnan(smooth([math.nan], 0.5)[0])


def test_learning_rates_have_a_constant_ratio():
    rates = exponential_rates(1e-7, 1.0, 100)
    assert (rates[0], rates[-1]) == (1e-7, pytest.approx(1.0, rel=1e-12))
    ratios = [b / a for a, b in itertools.pairwise(rates)]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-9)


def test_slope_is_taken_against_the_logarithm_of_the_learning_rate():
    """Against the learning rate itself, the first of two equal drops is the steepest."""
    rates = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    losses = (5.0, 4.9, 4.6, 3.0, 2.9)
    against_log = [
        (losses[i + 1] - losses[i - 1]) / (math.log(rates[i + 1]) - math.log(rates[i - 1]))
        for i in range(1, 4)
    ]
    assert steepest(rates, losses) == 1 + against_log.index(min(against_log)) == 2
    against_rate = [
        (losses[i + 1] - losses[i - 1]) / (rates[i + 1] - rates[i - 1]) for i in range(1, 4)
    ]
    assert 1 + against_rate.index(min(against_rate)) == 1


@given(LOSSES)
def test_valley_is_the_middle_of_the_longest_decreasing_subsequence(losses: list[float]):
    rates = exponential_rates(1e-3, 1.0, len(losses))
    longest, ends = 0, set()
    for size in range(1, len(losses) + 1):
        for chosen in itertools.combinations(range(len(losses)), size):
            if all(losses[a] > losses[b] for a, b in itertools.pairwise(chosen)):
                if size > longest:
                    longest, ends = size, set()
                ends.add((chosen[0], chosen[-1]))
    middles = [math.sqrt(rates[a] * rates[b]) for a, b in ends]
    assert any(valley(rates, losses) == pytest.approx(m) for m in middles)


def test_noisy_start_is_skipped():
    rates = exponential_rates(1e-6, 1.0, 61)
    losses = [5 - 4 / (1 + (1e-3 / rate) ** 2) + (10 * rate) ** 2 for rate in rates]
    losses[1] = 100.0  # a steep drop to the next point
    found = RangeTest(learning_rates=rates, losses=tuple(losses), smoothing=0.0, skip=10)
    assert found.suggestion == pytest.approx(1e-3, rel=0.3)
    assert found.bracket is not None
    minimum = rates[losses.index(min(losses))]
    assert minimum / 10 in found.bracket
    assert found.bracket[0] <= found.bracket[1]


@pytest.mark.parametrize("losses", [[1.0 + i for i in range(30)], [2.0] * 30, [math.nan] * 30])
def test_loss_that_never_falls_gives_no_suggestion(losses: list[float]):
    found = RangeTest(learning_rates=exponential_rates(1e-3, 1, 30), losses=tuple(losses))
    assert found.suggestion is None
    assert found.bracket is None


def test_sweep_of_one_point_gives_no_suggestion():
    found = RangeTest(learning_rates=(1e-7,), losses=(math.nan,))
    assert found.suggestion is None


def test_plot_shows_the_suggestion():
    rates = exponential_rates(1e-6, 1.0, 61)
    losses = [5 - 4 / (1 + (1e-3 / rate) ** 2) for rate in rates]
    found = RangeTest(learning_rates=rates, losses=tuple(losses))
    ax = found.plot()
    assert ax.get_xscale() == "log"
    assert any(f"{found.suggestion:.2g}" in text.get_text() for text in ax.get_legend().texts)
    assert found.plot(ax) is ax
    ax.figure.clear()
