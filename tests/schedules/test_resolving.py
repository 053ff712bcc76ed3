"""Resolving schedules on a horizon: conversion, compression, and invalid units."""

from __future__ import annotations

import pytest

from lightning_bigopt.durations import Horizon
from lightning_bigopt.schedules import (
    Chain,
    Clamp,
    Constant,
    InfiniteSchedule,
    InverseSquareRoot,
    Linear,
    MultiStep,
    Product,
    Schedule,
    Seesaw,
    StepDecay,
    Warmup,
    WarmupCosine,
    WarmupInverseSquareRoot,
    WarmupStableDecay,
)

RUN = Horizon.of_steps(1000, samples_per_step=10, steps_per_epoch=100)


@pytest.mark.parametrize(
    "schedule",
    [
        WarmupCosine(warmup=10),
        WarmupStableDecay(decay="1 epoch"),
        InverseSquareRoot(timescale="100 samples"),
        WarmupInverseSquareRoot(warmup="1%", timescale=10),
        MultiStep({10: 0.5}),
        Warmup("10 steps", Constant()),
        Warmup("10%", StepDecay(every=10)),
        Chain([(10, Constant()), Linear()]),
        Chain([("10%", Constant()), Warmup(10, Linear(), start=1.0)]),
        Product([Constant(), WarmupCosine(warmup=10)]),
        Clamp(WarmupCosine(warmup=10), low=0.1),
        Seesaw(WarmupCosine(warmup=10)),
        InfiniteSchedule(cooldown="1 epoch"),
    ],
    ids=repr,
)
def test_unresolved_duration_raises_with_a_remedy(schedule: Schedule):
    with pytest.raises(ValueError, match=r"must be resolved .*got '\d+ .*resolve\(horizon\)"):
        schedule(0.0)
    with pytest.raises(ValueError, match="must be resolved"):
        schedule(0.5)
    resolved = schedule.resolve(RUN)
    assert resolved.resolve(RUN) == resolved
    assert 0.0 <= resolved(0.5) <= 1.0


def test_resolving_does_not_change_the_original():
    schedule = WarmupStableDecay(warmup=100, decay="20%")
    short = schedule.resolve(RUN)
    longer = schedule.resolve(Horizon.of_steps(2000))
    assert short.boundaries() == {"warmup ends": 0.1, "cooldown starts": 0.8}
    assert longer.boundaries() == {"warmup ends": 0.05, "cooldown starts": 0.8}
    assert schedule == WarmupStableDecay(warmup=100, decay="20%")


def test_percent_refers_to_the_whole_in_a_recipe_and_to_the_rest_in_a_composition():
    recipe = WarmupInverseSquareRoot(warmup="50%", timescale="20%").resolve(RUN)
    composed = Warmup("50%", InverseSquareRoot(timescale="40%")).resolve(RUN)
    for fraction in (0.2, 0.5, 0.7, 1.0):
        assert recipe(fraction) == pytest.approx(composed(fraction), abs=1e-12)


def test_fast_dev_run_compresses_durations():
    tiny = Horizon(clock="steps", budget=1, overlong="compress")
    for schedule in (
        WarmupStableDecay(warmup=300, decay=100),
        Chain([(10, Linear()), (30, Constant(0.0)), Constant(0.0)]),
        MultiStep({10: 0.5, 40: 0.1}),
        Warmup(10, WarmupCosine(warmup=10)),
        InfiniteSchedule(warmup=10, decay=10, cooldown=20),
    ):
        assert 0.0 <= schedule.resolve(tiny)(0.0) <= 1.0
    compressed = WarmupStableDecay(warmup=300, decay=100).resolve(tiny)
    assert compressed == WarmupStableDecay(warmup="75%", decay="25%")
    halves = MultiStep({10: 0.5, 40: 0.1}).resolve(tiny)
    assert halves == MultiStep({"25%": 0.5, "100%": 0.1})


def test_without_spans_only_percent_and_the_unit_of_the_budget_convert():
    blind = Horizon(clock="samples", budget=10_000)
    assert WarmupCosine(warmup="1000 samples").resolve(blind) == WarmupCosine(warmup="10%")
    with pytest.raises(ValueError, match="warmup must be in samples or percent here"):
        WarmupCosine(warmup=10).resolve(blind)
    with pytest.raises(ValueError, match="warmup must not be in epochs if the length"):
        WarmupCosine(warmup="1 epoch").resolve(blind)


def test_periods_in_different_units_need_equal_updates():
    from lightning_bigopt.durations import Span
    from lightning_bigopt.schedules import Cyclic

    wave = Cyclic(up=10, down="200 samples")
    assert wave.resolve(RUN) == Cyclic(up="1%", down="2%")
    ramp = (Span(updates=50, samples=10), Span(updates=50, samples=30))
    with pytest.raises(ValueError, match="up and down must be in the same unit"):
        wave.resolve(Horizon(clock="steps", budget=100, spans=ramp))
