"""Warmup, Product and Clamp: formulas and errors."""

from __future__ import annotations

import re

import pytest

from lightning_bigopt.durations import Horizon
from lightning_bigopt.schedules import (
    Chain,
    Clamp,
    Constant,
    Linear,
    MultiStep,
    Product,
    Seesaw,
    StepDecay,
    Warmup,
    WarmupLinear,
)

RUN = Horizon.of_steps(1000, samples_per_step=10, steps_per_epoch=100)


class TestWarmup:
    def test_rises_to_the_start_of_the_schedule(self):
        warmup = Warmup("50%", Constant(0.4), start=0.2)
        assert [warmup(f) for f in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.2, 0.3, 0.4, 0.4])

    def test_may_fall_from_a_higher_start(self):
        warmup = Warmup("50%", Constant(), start=2.0)
        assert warmup(0.25) == 1.5

    @pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
    def test_first_update_gets_the_start_and_the_last_less_than_the_peak(self, shape: str):
        factors = Warmup(10, Constant(), shape=shape, start=0.0).values(20)
        assert factors[0] == 0.0
        assert factors[9] < 1.0
        assert factors[10:] == [1.0] * 10
        assert factors[:11] == sorted(factors[:11])

    def test_starts_at_a_fraction_of_the_base(self):
        assert 0.25 * Warmup("50%", Constant(), start=0.5)(0.25) == 0.1875

    def test_warmup_of_length_zero_is_the_schedule(self):
        assert Warmup(0, Linear()).values(4) == Linear().values(4)

    def test_warmup_of_the_whole_budget_ends_at_the_peak(self):
        warmup = Warmup("100%", Linear())
        assert [warmup(f) for f in (0.0, 0.5, 1.0, 3.0)] == [0.0, 0.5, 1.0, 1.0]

    def test_must_fit_into_the_budget(self):
        with pytest.raises(ValueError, match="duration must be at most the whole budget"):
            Warmup(1001, Linear()).resolve(RUN)

    def test_warmup_of_a_warmup(self):
        nested = Warmup(100, Warmup(100, Constant(), start=0.5)).resolve(RUN)
        assert [nested(step / 1000) for step in (0, 50, 100, 150, 200)] == pytest.approx(
            [0.0, 0.25, 0.5, 0.75, 1.0]
        )


class TestProduct:
    def test_multiplies_the_factors(self):
        product = Product([Linear(), MultiStep({"50%": 0.5}), Constant(0.5)])
        assert [product(f) for f in (0.0, 0.25, 0.5)] == [0.5, 0.375, 0.125]

    def test_every_factor_is_evaluated_over_the_whole_budget(self):
        product = Product([StepDecay(decay=0.5, every=100), WarmupLinear(warmup=100)]).resolve(RUN)
        assert product(0.05) == 0.5
        assert product.boundaries() == {"schedule 2: warmup ends": 0.1}

    @pytest.mark.parametrize("schedules", [[], Linear(), "Linear", [Linear(), 1.0]])
    def test_invalid_schedules_raise(self, schedules):
        with pytest.raises(ValueError, match=r"schedules(\[1\])? must be a"):
            Product(schedules)


class TestClamp:
    def test_bounds_are_factors(self):
        clamp = Clamp(Linear(), low=0.25, high=0.75)
        assert [clamp(f) for f in (0.0, 0.5, 1.0)] == [0.75, 0.5, 0.25]
        assert clamp.values(2, base=0.5) == [0.375, 0.25]

    def test_warmup_rises_to_the_bounded_factor(self):
        bounded = Warmup("50%", Clamp(Linear(), high=0.6))
        assert [bounded(f) for f in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.0, 0.3, 0.6, 0.0])

    def test_inside_a_chain(self):
        chain = Chain([("50%", Constant()), Clamp(Linear(), low=0.1)]).resolve(RUN)
        assert [chain(f) for f in (0.25, 0.5, 0.75, 1.0)] == pytest.approx([1.0, 1.0, 0.5, 0.1])

    def test_with_a_cooldown(self):
        bounded = Clamp(Constant(), high=0.4).with_cooldown(0.5, over=0.5, shape="linear")
        assert [bounded(f) for f in (0.5, 0.75, 1.0)] == pytest.approx([0.4, 0.2, 0.0])

    def test_inside_a_product_and_a_seesaw(self):
        assert Product([Constant(0.5), Clamp(Linear(), low=0.1)])(1.0) == 0.05
        assert Seesaw(Clamp(Linear(), low=0.25)).batch_factor(1.0) == 4.0

    @pytest.mark.parametrize(
        ("bounds", "arguments"),
        [
            ({"low": 1e-5}, "min_lr=1e-05"),
            ({"high": 8e-4}, "max_lr=0.0008"),
            ({"low": 2e-4, "high": 8e-4}, "min_lr=0.0002, max_lr=0.0008"),
            ({}, "min_lr=..., max_lr=..."),
        ],
    )
    def test_absolute_bounds_of_version_0_1_raise_with_the_new_line(self, bounds, arguments: str):
        message = (
            "Clamp's unit must be 'factor', got 'lr'; absolute bounds are "
            f"LearningRateScheduler(schedule, {arguments})"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            Clamp(Linear(), **bounds, unit="lr")

    def test_unit_argument_of_version_0_1_is_accepted(self):
        assert Clamp(Linear(), low=0.1, unit="factor") == Clamp(Linear(), low=0.1)

    @pytest.mark.parametrize(
        ("bounds", "message"),
        [
            ({}, "low or high must be given"),
            ({"low": 0.5, "high": 0.4}, "low must be at most high, got low=0.5 and high=0.4"),
            ({"low": -0.1}, "low must be non-negative and finite, got -0.1"),
            ({"high": float("nan")}, "high must be non-negative and finite, got nan"),
            ({"low": 0.1, "unit": "rate"}, "Clamp's unit must be 'factor', got 'rate'"),
        ],
    )
    def test_invalid_bounds_raise(self, bounds, message: str):
        with pytest.raises(ValueError, match=message):
            Clamp(Linear(), **bounds)
