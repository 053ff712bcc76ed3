"""Cooldowns from the factor that a schedule has reached."""

from __future__ import annotations

import pytest

from lightning_bigopt.durations import Horizon
from lightning_bigopt.schedules import (
    Constant,
    InfiniteSchedule,
    Linear,
    WarmupConstant,
    WarmupStableDecay,
)

RUN = Horizon.of_steps(1000, samples_per_step=10, steps_per_epoch=100)


def test_starts_from_the_factor_reached():
    cooled = Linear().with_cooldown(0.5, over=0.25, shape="linear", end=0.1)
    factors = [cooled(f) for f in (0.25, 0.5, 0.625, 0.75, 0.9, 1.0)]
    assert factors == pytest.approx([0.75, 0.5, 0.3, 0.1, 0.1, 0.1])


def test_cooldown_of_a_constant_equals_wsd():
    recipe = WarmupStableDecay(warmup="10%", decay="30%", cooldown="cosine", end=0.2)
    branch = WarmupConstant(warmup="10%").with_cooldown(0.7, over=0.3, shape="cosine", end=0.2)
    for step in range(101):
        assert recipe(step / 100) == pytest.approx(branch(step / 100), abs=1e-12)


def test_may_end_beyond_the_budget():
    cooled = Constant().with_cooldown(1.0, over=0.5, shape="linear")
    assert [cooled(f) for f in (0.5, 1.0, 1.25, 1.5, 9.0)] == [1.0, 1.0, 0.5, 0.0, 0.0]


def test_beyond_the_budget_starts_from_the_last_factor():
    cooled = Linear(end=0.5).with_cooldown(2.0, over=1.0, shape="linear")
    assert [cooled(f) for f in (1.0, 1.5, 2.0, 2.5)] == [0.5, 0.5, 0.5, 0.25]


def test_factor_never_rises():
    cooled = Linear().with_cooldown(0.9, over=0.1, end=0.5)
    assert cooled(1.0) == pytest.approx(0.1)


def test_resolves_the_inner_schedule():
    cooled = WarmupConstant(warmup=100).with_cooldown(0.5, over=0.1)
    assert cooled.resolve(RUN).boundaries() == {
        "warmup ends": 0.1,
        "cooldown starts": 0.5,
        "cooldown ends": 0.6,
    }


def test_infinite_schedule_with_cooldown_equals_the_endless_one_with_a_cooldown():
    endless = InfiniteSchedule(warmup="5%", decay="15%", plateau=0.4)
    assert endless(1.0) == pytest.approx(0.4)
    planned = InfiniteSchedule(
        warmup="5%", decay="15%", plateau=0.4, cooldown="20%", cooldown_shape="linear"
    )
    demanded = endless.with_cooldown(0.8, over=0.2, shape="linear")
    for step in range(101):
        assert planned(step / 100) == pytest.approx(demanded(step / 100), abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"at": -0.1, "over": 0.1}, "at must be non-negative and finite, got -0.1"),
        ({"at": 0.5, "over": 0.0}, "over must be positive and finite, got 0.0"),
        ({"at": 0.5, "over": 0.1, "end": -1.0}, "end must be non-negative and finite"),
        ({"at": 0.5, "over": 0.1, "shape": "steep"}, "shape must be 'linear', 'cosine', "),
    ],
)
def test_invalid_arguments_raise(arguments, message: str):
    with pytest.raises(ValueError, match=message):
        Constant().with_cooldown(**arguments)
