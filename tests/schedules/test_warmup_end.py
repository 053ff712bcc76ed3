"""``Schedule.warmup_end``: the end of the rise with which a schedule begins."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given

from lightning_bigopt import schedules
from lightning_bigopt.durations import Horizon, Span
from lightning_bigopt.schedules import (
    REX,
    Chain,
    Clamp,
    Constant,
    Cooldown,
    Cosine,
    CosineWithRestarts,
    Cyclic,
    Exponential,
    InfiniteSchedule,
    InverseSquareRoot,
    Linear,
    MultiStep,
    Noam,
    OneCycle,
    PiecewiseLinear,
    Polynomial,
    Power,
    Product,
    Schedule,
    Seesaw,
    StepDecay,
    TriStage,
    Warmup,
    WarmupConstant,
    WarmupCosine,
    WarmupInverseSquareRoot,
    WarmupLinear,
    WarmupStableDecay,
)
from tests.schedules import strategies as some

RISE = Linear(start=0.0, end=1.0)


@dataclass(frozen=True, kw_only=True)
class Triangle(Schedule):
    """A user's schedule with a boundary named for the end of its warm-up."""

    def factor(self, fraction: float) -> float:
        return 1.0 - abs(2.0 * fraction - 1.0)

    def boundaries(self) -> dict[str, float]:
        return {"warmup ends": 0.5}


@dataclass(frozen=True, kw_only=True)
class Square(Schedule):
    """A user's schedule that only rises and has no boundaries."""

    def factor(self, fraction: float) -> float:
        return fraction**2


WITH_WARMUP = [
    (WarmupConstant(warmup="10%"), 0.1),
    (WarmupLinear(warmup="10%"), 0.1),
    (WarmupCosine(warmup="10%"), 0.1),
    (WarmupInverseSquareRoot(warmup="10%"), 0.1),
    (WarmupStableDecay(warmup="10%"), 0.1),
    (WarmupStableDecay(warmup="40%", decay="60%"), 0.4),
    (InfiniteSchedule(warmup="10%", cooldown="20%"), 0.1),
    (TriStage(warmup="10%"), 0.1),
    (Noam(warmup="10%"), 0.1),
    (OneCycle(warmup="30%"), 0.3),
    (Triangle(), 0.5),
    (Warmup("10%", Constant()), 0.1),
    (Warmup("100%", Constant()), 1.0),
    (Warmup("10%", StepDecay()), 0.1),
    (Warmup("50%", WarmupLinear(warmup="50%", start=0.5)), 0.75),
    (Warmup(0, OneCycle(warmup="30%")), 0.3),
    (PiecewiseLinear({"0%": 0.0, "10%": 1.0, "100%": 0.0}), 0.1),
    (PiecewiseLinear({"5%": 0.0, "10%": 0.5, "20%": 1.0, "40%": 1.0, "50%": 0.0}), 0.2),
    (MultiStep({"0%": 0.25, "10%": 0.5, "20%": 1.0, "60%": 0.1}), 0.2),
    (Clamp(OneCycle(warmup="30%"), high=0.9), 0.3),
    (Clamp(WarmupCosine(warmup="10%"), low=0.1), 0.1),
    (Seesaw(WarmupCosine(warmup="10%")), 0.1),
    (Seesaw(OneCycle(warmup="30%")), 0.3),
    (Product([Linear(), WarmupConstant(warmup="10%")]), 0.1),
    (Product([OneCycle(warmup="30%"), WarmupConstant(warmup="10%"), StepDecay()]), 0.3),
    (OneCycle(warmup="30%").with_cooldown(0.5, over=0.5), 0.3),
    (OneCycle(warmup="30%").with_cooldown(0.2, over=0.5), 0.2),
    (WarmupConstant(warmup="10%").with_cooldown(0.1, over=0.5), 0.1),
    (WarmupConstant(warmup="10%").with_cooldown(2.0, over=0.5), 0.1),
    (Chain([WarmupLinear(warmup="10%")]), 0.1),
    (Chain([("50%", WarmupConstant(warmup="20%")), Cosine()]), 0.1),
    (Chain([("50%", OneCycle(warmup="20%", end=0.5)), Linear(start=0.5)]), 0.1),
    (Chain([("20%", RISE), ("50%", Constant()), Cosine(end=0.1)]), 0.2),
    (Chain([("20%", Square()), Cosine()]), 0.2),
    (Chain([("10%", Linear(start=0.0, end=0.5)), Linear(start=0.5)]), 0.1),
    (Chain([("10%", RISE), WarmupLinear(warmup="50%", start=1.0)], seams="scale"), 0.55),
    (Chain([("10%", Linear(start=0.0, end=0.5)), ("10%", Cosine(start=0.5, end=1.0)), REX()]), 0.2),
    (Chain([(0, Constant()), ("10%", RISE), Constant()]), 0.1),
    (Chain([("10%", RISE), WarmupLinear(warmup="50%")], seams="jump"), 0.1),
]
WITHOUT_WARMUP = [
    Constant(),
    Linear(),
    Cosine(),
    Polynomial(),
    REX(),
    Cooldown(),
    Exponential(),
    StepDecay(),
    Power(),
    InverseSquareRoot(),
    MultiStep(),
    PiecewiseLinear(),
    CosineWithRestarts(),
    Cyclic(),
    RISE,
    Square(),
    PiecewiseLinear({"0%": 0.0, "100%": 1.0}),
    WarmupCosine(warmup=0),
    WarmupStableDecay(warmup=0),
    InfiniteSchedule(warmup=0),
    Warmup(0, Linear()),
    Warmup(0, Cyclic()),
    Clamp(Cyclic(), low=0.3),
    Seesaw(Linear()),
    Product([Linear(), MultiStep()]),
    Linear().with_cooldown(0.5, over=0.5),
    Chain([("50%", Constant()), Linear()]),
    Chain([("50%", Linear()), WarmupLinear(warmup="10%")]),
    Chain([("50%", Cyclic(up="20%", low=0.0)), Linear(start=0.5)], seams="jump"),
]


@pytest.mark.parametrize(("schedule", "end"), WITH_WARMUP, ids=lambda value: repr(value)[:60])
def test_warmup_end_is_the_end_of_the_first_rise(schedule: Schedule, end: float):
    resolved = schedule.resolve(Horizon.of_steps(1000))
    assert resolved.warmup_end() == pytest.approx(end, abs=1e-12)
    moments = [end * index / 50 for index in range(51)]
    factors = [resolved(moment) for moment in moments[:-1]]
    assert all(a <= b + 1e-12 for a, b in pairwise(factors))
    assert factors[0] < factors[-1]


@pytest.mark.parametrize("schedule", WITHOUT_WARMUP, ids=lambda value: repr(value)[:60])
def test_schedules_without_a_rise_have_no_warmup_end(schedule: Schedule):
    assert schedule.resolve(Horizon.of_steps(1000)).warmup_end() == 0.0


def test_every_schedule_is_tested():
    tried = {type(schedule).__name__ for schedule, _ in WITH_WARMUP}
    tried |= {type(schedule).__name__ for schedule in WITHOUT_WARMUP}
    assert set(schedules.__all__) - {"Schedule"} <= tried


@given(some.warmed_up)
def test_schedule_with_one_rise_only_falls_after_warmup_end(schedule: Schedule):
    end = schedule.warmup_end()
    assert 0.0 < end < 1.0
    before = [schedule(end * index / 40) for index in range(40)]
    after = [schedule(end + (1.0 - end) * index / 40) for index in range(41)]
    assert all(a <= b + 1e-12 for a, b in pairwise(before))
    assert all(a >= b - 1e-12 for a, b in pairwise(after))


@given(some.anything)
def test_warmup_end_is_inside_the_budget(schedule: Schedule):
    assert 0.0 <= schedule.warmup_end() <= 1.0 + 1e-12


@given(some.warmed_up)
def test_warmup_end_is_the_boundary_of_that_name(schedule: Schedule):
    named = schedule.boundaries().get("warmup ends", schedule.boundaries().get("peak"))
    assert schedule.warmup_end() == named


def test_warmup_end_of_a_warmup_in_other_units():
    horizon = Horizon.of_steps(1000, samples_per_step=10)
    for warmup in (100, "1000 samples", "10%"):
        assert WarmupCosine(warmup=warmup).resolve(horizon).warmup_end() == 0.1


def test_warmup_end_with_a_growing_batch():
    spans = (Span(updates=50, samples=10), Span(updates=50, samples=30))
    horizon = Horizon(clock="steps", budget=100, spans=spans)
    inner = InverseSquareRoot(timescale="100 samples")
    assert Warmup("250 samples", inner).resolve(horizon).warmup_end() == 0.25
    assert Cyclic(up="100 samples").resolve(horizon).warmup_end() == 0.0
    recipe = WarmupInverseSquareRoot(warmup="250 samples")
    assert recipe.resolve(horizon).warmup_end() == 0.25


def test_unresolved_duration_raises():
    for schedule in (WarmupCosine(warmup=10), OneCycle(warmup=10), Chain([(10, RISE), Linear()])):
        with pytest.raises(ValueError, match="must be resolved before the schedule is called"):
            schedule.warmup_end()
