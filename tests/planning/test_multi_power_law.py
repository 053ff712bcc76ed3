"""The Multi-Power Law against the double sum of the paper, its limits, and invalid arguments."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_bigopt.planning.multi_power_law import MultiPowerLaw, RateHistory
from lightning_bigopt.schedules import (
    MultiStep,
    WarmupConstant,
    WarmupCosine,
    WarmupLinear,
    WarmupStableDecay,
)
from tests.planning.known_law import LAW


def paper_loss(rates: list[float], update: int) -> float:
    """Equations 1 and 2 as they stand: a sum over every update after the peak."""
    total = sum(rates[:update])
    loss = LAW["floor"] + LAW["scale"] * total ** -LAW["alpha"]
    peak = max(range(len(rates)), key=rates.__getitem__)
    for k in range(peak + 1, update):
        later = sum(rates[k:update])
        if later > 0:
            argument = 1 + LAW["drop_speed"] * rates[k] ** -LAW["gamma"] * later
            loss -= LAW["drop"] * (rates[k - 1] - rates[k]) * (1 - argument ** -LAW["beta"])
    return loss


@pytest.mark.parametrize(
    "schedule",
    [
        WarmupConstant(warmup="10%"),
        WarmupCosine(warmup="10%", end=0.1),
        WarmupLinear(warmup="10%", end=0.0),
        WarmupStableDecay(warmup="10%", decay="20%"),
        MultiStep(milestones=[("60%", 0.3)]),
    ],
    ids=lambda schedule: type(schedule).__name__,
)
@pytest.mark.parametrize(("updates", "tolerance"), [(200, 1e-12), (1500, 4e-4)])
def test_agrees_with_the_sum_of_the_paper(schedule, updates, tolerance):
    """Exact up to 256 updates; longer runs group the decays of neighboring updates."""
    rates = schedule.values(updates, base=3e-3)
    ends = [updates // 4, updates // 2, 9 * updates // 10, updates]
    expected = [paper_loss(rates, end) for end in ends]
    assert MultiPowerLaw(**LAW).losses(rates, ends) == pytest.approx(expected, abs=tolerance)


def test_constant_learning_rate_is_a_power_law():
    losses = MultiPowerLaw(**LAW).losses([1e-3] * 400, [100, 400])
    assert losses == pytest.approx([3 + 0.5 * 0.1**-0.5, 3 + 0.5 * 0.4**-0.5])


@pytest.mark.slow
def test_a_step_gains_its_share_of_the_drop_in_the_end():
    """Long after a step the loss is lower by B times the fall of the learning rate."""
    rates = np.concatenate([np.full(1000, 1e-3), np.full(4_000_000, 5e-4)])
    law = MultiPowerLaw(**{**LAW, "drop_speed": 1e4})
    without = LAW["floor"] + LAW["scale"] * rates.sum() ** -LAW["alpha"]
    gain = without - law.losses(rates, [rates.size])[0]
    assert gain == pytest.approx(400 * 5e-4, rel=0.01)


def test_updates_with_a_learning_rate_of_0_change_nothing():
    law = MultiPowerLaw(**LAW)
    rates = [1e-3] * 100 + [0.0] * 50
    first, last = law.losses(rates, [100, 150])
    assert math.isfinite(last)
    assert first == pytest.approx(last)


def test_the_past_does_not_depend_on_the_future():
    law = MultiPowerLaw(**LAW)
    rates = WarmupLinear(warmup=10, end=0.0).values(200, base=1e-3)
    whole = law.losses(rates, [50, 120])
    assert law.losses(rates[:120], [50, 120]) == pytest.approx(list(whole), abs=1e-12)


@pytest.mark.parametrize(
    ("rates", "updates", "message"),
    [
        ([], [1], "learning_rates must be a list"),
        (1e-3, [1], "learning_rates must be a list"),
        ([1e-3, float("nan")], [1], "list of finite numbers"),
        ([1e-3, -1e-3], [1], "must be non-negative"),
        ([0.0, 0.0], [1], "not all 0"),
        ([0.0, 1e-3], [1], "above 0 before the first"),
        ([1e-3], [2], "updates must be from 1 to 1"),
        ([1e-3], [0], "updates must be from 1 to 1"),
    ],
)
def test_invalid_histories(rates, updates, message):
    with pytest.raises(ValueError, match=message):
        RateHistory(rates, updates)


@pytest.mark.parametrize("name", list(LAW))
def test_invalid_parameters(name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        MultiPowerLaw(**{**LAW, name: float("nan")})
