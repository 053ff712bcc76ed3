"""LossCurve: learning rates between the logged ones, bins, and invalid runs."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_bigopt.planning import LossCurve
from lightning_bigopt.schedules import (
    MultiStep,
    WarmupConstant,
    WarmupCosine,
    WarmupLinear,
    WarmupStableDecay,
)


def curve(**changes) -> LossCurve:
    values = {"learning_rates": [0.1] * 20, "updates": [5, 10, 20], "losses": [3.0, 2.0, 1.0]}
    return LossCurve(**{**values, **changes})


@pytest.mark.parametrize("every", [1, 7, 10])
@pytest.mark.parametrize(
    "schedule",
    [
        WarmupConstant(warmup="10%"),
        WarmupLinear(warmup="10%", end=0.0),
        WarmupCosine(warmup="10%", end=0.1),
        MultiStep(milestones=[("50%", 0.3), ("70%", 0.1)]),
    ],
    ids=lambda schedule: type(schedule).__name__,
)
def test_learning_rates_between_the_logged_ones(schedule, every):
    """Interpolated learning rates and their sum agree with those of the schedule."""
    true = schedule.values(210, base=0.02)
    steps = list(range(0, 210, every))
    found = LossCurve.from_points(
        steps=steps, learning_rates=[true[step] for step in steps], updates=[210], losses=[1.0]
    )
    assert sum(found.learning_rates) == pytest.approx(sum(true), rel=0.04)
    if every == 1:
        assert found.learning_rates == pytest.approx(true)
    errors = np.abs(np.asarray(found.learning_rates) - true)
    assert (errors < 0.1 * 0.02).mean() > 0.95  # all but those within a step of the schedule


def test_linear_decay_of_few_records_is_not_taken_for_steps():
    steps = [0, 50, 60, 70, 80, 90, 99]
    rates = [1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.02]
    found = LossCurve.from_points(steps=steps, learning_rates=rates, updates=[100], losses=[1.0])
    assert found.learning_rates[55] == pytest.approx(0.9)


@pytest.mark.parametrize("schedule", [WarmupStableDecay(warmup=30), WarmupLinear(warmup=30)])
def test_cooldown_in_a_sparse_log_is_no_step(schedule):
    true = schedule.values(300, base=1.0)
    steps = [0, *range(49, 300, 50)]
    found = LossCurve.from_points(
        steps=steps, learning_rates=[true[step] for step in steps], updates=[300], losses=[1.0]
    )
    assert found.learning_rates[270] == pytest.approx(true[270], abs=0.15)


def test_a_single_fall_is_a_step_at_the_later_update():
    found = LossCurve.from_points(
        steps=[0, 40, 60, 99], learning_rates=[1.0, 1.0, 0.3, 0.3], updates=[100], losses=[1.0]
    )
    assert found.learning_rates[59] == 1.0
    assert found.learning_rates[60] == pytest.approx(0.3)


def test_warmup_before_the_first_record():
    found = LossCurve.from_points(
        steps=[10, 20], learning_rates=[1.0, 1.0], updates=[20], losses=[1.0], warmup=8
    )
    assert found.learning_rates[:11] == pytest.approx([0, 0, 0, *(i / 8 for i in range(1, 8)), 1])
    assert found.warmup == 11


def test_bins_are_means_after_the_warmup():
    rates = [*np.linspace(0.1, 1.0, 10), *[1.0] * 90]
    losses = np.arange(1.0, 101.0)
    found = LossCurve(learning_rates=rates, updates=range(1, 101), losses=losses)
    updates, means = found.binned(7)
    assert updates.tolist() == [16, 29, 42, 55, 68, 81, 94]
    assert means == pytest.approx(updates)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": [1.0]}, "as many as updates"),
        ({"losses": [], "updates": []}, "at least one, got"),
        ({"losses": [1.0, float("nan"), 2.0]}, "losses of run must be a list of finite numbers"),
        ({"updates": [5, 10.5, 20]}, "whole numbers"),
        ({"updates": [5, 5, 20]}, "must ascend from 1"),
        ({"updates": [0, 5, 20]}, "must ascend from 1"),
        ({"updates": [5, 10, 21]}, "at most 20"),
        ({"learning_rates": [0.0] * 20}, "not all 0"),
    ],
)
def test_invalid_curves(changes, message):
    with pytest.raises(ValueError, match=message):
        curve(**changes)


def test_steps_of_learning_rates_must_ascend():
    with pytest.raises(ValueError, match=r"steps must ascend .* got \[5, 1\]"):
        LossCurve.from_points(steps=[5, 1], learning_rates=[1.0, 1.0], updates=[6], losses=[1.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"steps": [0.5, 4]},
            r"steps must be a list of whole numbers up to 1,000,000,000, got \[0.5, 4\]",
        ),
        ({"steps": ["0", "4"]}, "steps must be a list of finite numbers"),
        ({"updates": [3.7]}, r"updates of pilot must be a list of whole numbers .* got \[3.7\]"),
        ({"updates": [1e300]}, "updates of pilot must be a list of whole numbers"),
    ],
)
def test_counts_are_not_rounded(changes, message):
    points = {"steps": [0, 4], "learning_rates": [1.0, 1.0], "updates": [3], "losses": [1.0]}
    with pytest.raises(ValueError, match=message):
        LossCurve.from_points(**{**points, **changes}, name="pilot")


def test_losses_count_after_the_warmup_and_the_start():
    rates = [0.1, 0.2, 0.3, *[0.4] * 9]
    run = LossCurve(learning_rates=rates, updates=range(1, 13), losses=range(20, 8, -1))
    for start, first in ((0, 4), (3, 4), (5, 5)):
        updates, losses = run.counted(start=start)
        assert updates.tolist() == list(range(first, 13))
        assert losses.tolist() == list(range(21 - first, 8, -1))


def test_too_few_losses_after_the_warmup():
    with pytest.raises(ValueError, match="at least 8 losses after the warm-up, got 3 in run"):
        curve().binned(10)
