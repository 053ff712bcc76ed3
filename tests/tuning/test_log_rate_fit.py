"""The fit of the best learning rate, compared with NumPy, SciPy and simulated batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lightning_bigopt.tuning.log_rate_fit import optimum_of, paired_errors, weighted_center

RATES = [1e-3, 2.5e-3, 6.25e-3, 1.5625e-2]


def test_center_equals_the_weighted_average_of_numpy() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        positions, losses = generator.normal(size=5), generator.uniform(1, 3, size=5)
        softness = 0.05 * (4.0 - losses.min())
        weights = 1 / (1 + ((losses - losses.min()) / softness) ** 2)
        expected = np.average(positions, weights=weights)
        found = weighted_center(positions.tolist(), losses.tolist(), initial=4.0)
        assert found == pytest.approx(expected)


def test_center_is_the_minimum_of_a_symmetric_basin() -> None:
    """Any even function of the distance to a point of the grid or to the middle of two."""
    positions = [0.0, 1.0, 2.0, 3.0]
    for power in (1, 2, 4):
        losses = [1.0 + 0.2 * abs(x - 1.5) ** power for x in positions]
        assert weighted_center(positions, losses, initial=5.0) == pytest.approx(1.5)
        losses = [1.0 + 0.2 * abs(x - 1.0) ** power for x in positions[:3]]
        assert weighted_center(positions[:3], losses, initial=5.0) == pytest.approx(1.0)


def test_optimum_does_not_depend_on_the_units_of_loss_and_learning_rate() -> None:
    losses = [[2.5, 2.7], [2.0, 2.1], [2.2, 2.0], [3.5, 3.9]]
    plain = optimum_of(RATES, losses, initial=5.0)
    scaled = optimum_of(
        [7 * rate for rate in RATES], [[3 * x + 1 for x in each] for each in losses], initial=16.0
    )
    assert scaled.learning_rate == pytest.approx(7 * plain.learning_rate)
    assert scaled.deviation == pytest.approx(plain.deviation)
    assert plain.edge is None
    assert RATES[1] < plain.learning_rate < RATES[2]


@pytest.mark.slow
def test_deviation_equals_that_of_new_batches() -> None:
    """Simulates fits on new batches; the losses of one batch are correlated over the branches."""
    generator = np.random.default_rng(1)
    basin = np.array([2.6, 2.1, 2.05, 2.7])

    def draw(batches: int) -> list[list[float]]:
        common = generator.normal(scale=0.5, size=(1, batches))
        own = generator.normal(scale=0.1, size=(4, batches))
        return (basin[:, None] + common + own).tolist()

    centers = [math.log(optimum_of(RATES, draw(40), initial=5.0).learning_rate) for _ in range(200)]
    estimates = [optimum_of(RATES, draw(40), initial=5.0).deviation for _ in range(20)]
    assert np.mean(estimates) == pytest.approx(np.std(centers), rel=0.2)


def test_diverged_branch_counts_as_one_that_learned_nothing() -> None:
    losses = [[3.0, 3.2], [2.0, 2.2], [2.4, 2.5]]
    diverged = optimum_of(RATES, [*losses, []], initial=5.0)
    assert diverged == optimum_of(RATES, [*losses, [5.0, 5.0]], initial=5.0)
    assert diverged == optimum_of(RATES, [*losses, [500.0, 700.0]], initial=5.0)


def test_lowest_loss_is_the_best_if_none_is_below_the_initial_one() -> None:
    losses = [[2.0, 2.1], [1.2, 1.3], [1.5, 1.6]]
    assert optimum_of(RATES[:3], losses, initial=1.0).learning_rate == pytest.approx(RATES[1])


@pytest.mark.parametrize(("best", "edge"), [(0, "low"), (1, None), (2, None), (3, "high")])
def test_edge_names_the_end_at_which_the_best_branch_is(best: int, edge: str | None) -> None:
    losses = [[2.0 + abs(index - best)] for index in range(4)]
    assert optimum_of(RATES, losses, initial=5.0).edge == edge


def test_edge_needs_a_significant_difference_to_the_next_branch() -> None:
    common = [2.0, 2.4, 1.8, 2.2]
    for shift, edge in (([0.1, 0.2, 0.1, 0.2], "high"), ([0.1, -0.4, 0.1, 0.25], None)):
        lower = [loss + change for loss, change in zip(common, shift, strict=True)]
        losses = [[4.0] * 4, lower, common]
        significant = stats.ttest_rel(lower, common).statistic > 2.0
        assert significant == (edge is not None)
        assert optimum_of(RATES[:3], losses, initial=5.0).edge == edge


def test_errors_equal_those_of_paired_differences() -> None:
    generator = np.random.default_rng(2)
    losses = generator.normal(size=(3, 7)).tolist()
    found = paired_errors([*losses, []], 1)
    assert found[0] == pytest.approx(stats.sem(np.subtract(losses[0], losses[1])))
    assert found[1] == 0.0
    assert found[2] == pytest.approx(stats.sem(np.subtract(losses[2], losses[1])))
    assert math.isnan(found[3])
    assert math.isnan(paired_errors([[1.0], [2.0]], 0)[1])
