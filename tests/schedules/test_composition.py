"""Chain, Warmup, Product, Clamp, cooldowns: what the parts see, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass

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
    WarmupConstant,
    WarmupCosine,
    WarmupInverseSquareRoot,
    WarmupLinear,
    WarmupStableDecay,
)

RUN = Horizon.of_steps(1000, samples_per_step=10, steps_per_epoch=100)


@dataclass(frozen=True, kw_only=True)
class Seen(Schedule):
    """Its factor is its own position: what a part of a composition sees."""

    def factor(self, fraction: float) -> float:
        return fraction


class TestChain:
    def test_each_part_sees_its_own_zero_to_one(self):
        chain = Chain([("30%", Seen()), (200, Seen()), Seen()], seams="jump").resolve(RUN)
        seen = [chain(step / 1000) for step in (0, 150, 299, 300, 400, 500, 750, 1000)]
        expected = [0.0, 0.5, 299 / 300, 0.0, 0.5, 0.0, 0.5, 1.0]
        assert seen == pytest.approx(expected, abs=1e-12)

    def test_percent_inside_a_part_is_of_the_part_and_steps_count_from_its_begin(self):
        parts = [("20%", Constant()), ("40%", WarmupConstant(warmup="25%")), Linear()]
        percent = Chain(parts, seams="jump").resolve(RUN)
        assert percent.boundaries()["part 2: warmup ends"] == pytest.approx(0.2 + 0.4 * 0.25)
        parts[1] = ("40%", WarmupConstant(warmup="150 steps"))
        steps = Chain(parts, seams="jump").resolve(RUN)
        assert steps.boundaries()["part 2: warmup ends"] == pytest.approx(0.35)
        parts[1] = ("40%", WarmupConstant(warmup="1 epoch"))
        epochs = Chain(parts, seams="jump").resolve(RUN)
        assert epochs.boundaries()["part 2: warmup ends"] == pytest.approx(0.3)

    def test_a_jump_is_refused_unless_asked_for(self):
        with pytest.raises(ValueError, match=r"parts must meet at their seams, got a jump from 0 "):
            Chain([("50%", Linear()), Linear()]).resolve(RUN)
        with pytest.raises(ValueError, match="seams='jump'"):
            Chain([("50%", Linear()), Linear()])(0.0)
        chain = Chain([("50%", Linear()), Linear()], seams="jump")
        assert (chain(0.5 - 1e-6), chain(0.5)) == (pytest.approx(0.0, abs=1e-5), 1.0)

    def test_scaled_parts_begin_where_the_one_before_ended(self):
        chain = Chain(
            [("25%", Linear(end=0.5)), ("25%", Linear(end=0.5)), Linear(start=0.2)], seams="scale"
        )
        assert [chain(f) for f in (0, 0.25, 0.5, 0.75, 1)] == [1.0, 0.5, 0.25, 0.125, 0.0]

    def test_a_part_that_begins_at_zero_cannot_be_scaled(self):
        with pytest.raises(ValueError, match="parts must meet at their seams"):
            Chain([("50%", Constant()), Linear(start=0.0, end=1.0)], seams="scale").resolve(RUN)

    def test_parts_without_length_are_passed_over(self):
        chain = Chain([(0, Constant(0.1)), ("100%", Linear()), Constant(0.7)]).resolve(RUN)
        assert [chain(f) for f in (0.0, 0.5, 1.0)] == [1.0, 0.5, 0.0]

    def test_parts_longer_than_the_budget_are_named(self):
        chain = Chain([(700, Constant()), ("1e4 samples", Constant()), Linear()])
        with pytest.raises(ValueError, match=r"parts\[0\] \+ parts\[1\] must be at most the whole"):
            chain.resolve(RUN)
        with pytest.raises(ValueError, match=r"parts\[0\] \+ parts\[1\] must be at most 100%"):
            Chain([("70%", Constant()), ("31%", Constant()), Linear()])

    @pytest.mark.parametrize(
        ("parts", "message"),
        [
            ([], "parts must be a list that ends with a Schedule, got"),
            ("Linear", "parts must be a list that ends with a Schedule, got"),
            ([("10%", Linear())], r"parts\[0\] must be a Schedule without a duration"),
            ([Linear(), Linear()], r"parts\[0\] must be a pair \(duration, schedule\), got"),
            ([("10%", "Linear"), Linear()], r"parts\[0\]\[1\] must be a Schedule, got 'Linear'"),
            ([("10 sheep", Linear()), Linear()], r"parts\[0\]\[0\] must have one of the units"),
        ],
    )
    def test_other_forms_are_refused(self, parts, message: str):
        with pytest.raises(ValueError, match=message):
            Chain(parts)

    def test_lists_and_tuples_are_the_same_chain(self):
        as_lists = Chain([["30%", Constant()], Linear()])
        assert as_lists == Chain((("30%", Constant()), Linear()))
        assert hash(as_lists) == hash(Chain([(0.3, Constant()), Linear()]))


class TestWarmup:
    def test_it_rises_to_where_the_schedule_begins(self):
        warmup = Warmup("50%", Constant(0.4), start=0.2)
        assert [warmup(f) for f in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.2, 0.3, 0.4, 0.4])

    def test_it_may_fall_from_a_higher_start(self):
        warmup = Warmup("50%", Constant(), start=2.0)
        assert warmup(0.25) == 1.5

    @pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
    def test_update_zero_sees_the_start_and_the_last_one_less_than_the_peak(self, shape: str):
        factors = Warmup(10, Constant(), shape=shape, start=0.0).values(20)
        assert factors[0] == 0.0
        assert factors[9] < 1.0
        assert factors[10:] == [1.0] * 10
        assert factors[:11] == sorted(factors[:11])

    def test_its_value_is_a_share_of_the_base(self):
        assert Warmup("50%", Constant(), start=0.5).value(0.25, 0.25) == 0.1875

    def test_no_warmup_begins_with_the_schedule(self):
        assert Warmup(0, Linear()).values(4) == Linear().values(4)

    def test_a_warmup_of_the_whole_budget_ends_at_the_peak(self):
        warmup = Warmup("100%", Linear())
        assert [warmup(f) for f in (0.0, 0.5, 1.0, 3.0)] == [0.0, 0.5, 1.0, 1.0]

    def test_it_must_fit(self):
        with pytest.raises(ValueError, match="duration must be at most the whole budget"):
            Warmup(1001, Linear()).resolve(RUN)

    def test_of_a_warmup(self):
        nested = Warmup(100, Warmup(100, Constant(), start=0.5)).resolve(RUN)
        assert [nested(step / 1000) for step in (0, 50, 100, 150, 200)] == pytest.approx(
            [0.0, 0.25, 0.5, 0.75, 1.0]
        )


class TestProduct:
    def test_multiplies(self):
        product = Product([Linear(), MultiStep({"50%": 0.5}), Constant(0.5)])
        assert [product(f) for f in (0.0, 0.25, 0.5)] == [0.5, 0.375, 0.125]

    def test_every_factor_sees_the_whole_budget(self):
        product = Product([StepDecay(decay=0.5, every=100), WarmupLinear(warmup=100)]).resolve(RUN)
        assert product(0.05) == 0.5
        assert product.boundaries() == {"schedule 2: warmup ends": 0.1}

    @pytest.mark.parametrize("schedules", [[], Linear(), "Linear", [Linear(), 1.0]])
    def test_refuses_what_is_no_list_of_schedules(self, schedules):
        with pytest.raises(ValueError, match=r"schedules(\[1\])? must be a"):
            Product(schedules)


class TestClamp:
    def test_bounds_as_factors(self):
        clamp = Clamp(Linear(), low=0.25, high=0.75)
        assert [clamp(f) for f in (0.0, 0.5, 1.0)] == [0.75, 0.5, 0.25]
        assert [clamp.value(f, 0.5) for f in (0.0, 0.5, 1.0)] == [0.375, 0.25, 0.125]

    def test_bounds_as_learning_rates(self):
        clamp = Clamp(Linear(), low=2e-4, high=8e-4, unit="lr")
        assert [clamp.value(f, 1e-3) for f in (0.0, 0.5, 1.0)] == [8e-4, 5e-4, 2e-4]
        assert [clamp.value(f, 1e-4) for f in (0.0, 0.5, 1.0)] == [2e-4, 2e-4, 2e-4]

    def test_without_a_base_there_is_no_factor(self):
        for schedule in (
            Clamp(Linear(), low=1e-5, unit="lr"),
            Warmup("10%", Clamp(Linear(), low=1e-5, unit="lr")),
            Chain([("10%", Constant()), Clamp(Linear(), low=1e-5, unit="lr")]),
            Clamp(Clamp(Linear(), low=1e-5, unit="lr"), high=0.5),
        ):
            assert schedule.needs_base
            with pytest.raises(ValueError, match=r"call schedule.value\(fraction, base\)"):
                schedule(0.5)

    def test_inside_a_warmup_it_rises_to_the_bounded_value(self):
        bounded = Warmup("50%", Clamp(Linear(), high=6e-4, unit="lr"))
        assert [bounded.value(f, 1e-3) for f in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(
            [0.0, 3e-4, 6e-4, 0.0]
        )

    def test_inside_a_chain(self):
        chain = Chain([("50%", Constant()), Clamp(Linear(), low=1e-4, unit="lr")]).resolve(RUN)
        assert [chain.value(f, 1e-3) for f in (0.25, 0.5, 0.75, 1.0)] == pytest.approx(
            [1e-3, 1e-3, 5e-4, 1e-4]
        )

    def test_with_a_cooldown(self):
        bounded = Clamp(Constant(), high=4e-4, unit="lr").with_cooldown(
            0.5, over=0.5, shape="linear"
        )
        assert [bounded.value(f, 1e-3) for f in (0.5, 0.75, 1.0)] == pytest.approx([4e-4, 2e-4, 0])
        with pytest.raises(ValueError, match=r"schedule.value\(fraction, base\)"):
            bounded(0.75)

    @pytest.mark.parametrize(
        "make",
        [lambda clamp: Product([Linear(), clamp]), Seesaw, lambda c: Seesaw(Warmup("1%", c))],
    )
    def test_goes_around_what_multiplies_factors(self, make):
        with pytest.raises(ValueError, match=r"must not hold Clamp\(unit='lr'\), got .*around"):
            make(Clamp(Linear(), low=1e-5, unit="lr"))

    @pytest.mark.parametrize(
        ("bounds", "message"),
        [
            ({}, "low or high must be given"),
            ({"low": 0.5, "high": 0.4}, "low must be at most high, got low=0.5 and high=0.4"),
            ({"low": -0.1}, "low must be a finite number from 0 on, got -0.1"),
            ({"high": float("nan")}, "high must be a finite number from 0 on, got nan"),
            ({"low": 0.1, "unit": "rate"}, "unit must be one of factor, lr, got 'rate'"),
        ],
    )
    def test_refuses_bad_bounds(self, bounds, message: str):
        with pytest.raises(ValueError, match=message):
            Clamp(Linear(), **bounds)


class TestCooldown:
    def test_starts_from_whatever_is_reached(self):
        cooled = Linear().with_cooldown(0.5, over=0.25, shape="linear", end=0.1)
        factors = [cooled(f) for f in (0.25, 0.5, 0.625, 0.75, 0.9, 1.0)]
        assert factors == pytest.approx([0.75, 0.5, 0.3, 0.1, 0.1, 0.1])

    def test_of_a_stable_run_is_wsd(self):
        recipe = WarmupStableDecay(warmup="10%", decay="30%", cooldown="cosine", end=0.2)
        branch = WarmupConstant(warmup="10%").with_cooldown(0.7, over=0.3, shape="cosine", end=0.2)
        for step in range(101):
            assert recipe(step / 100) == pytest.approx(branch(step / 100), abs=1e-12)

    def test_may_end_beyond_the_budget(self):
        cooled = Constant().with_cooldown(1.0, over=0.5, shape="linear")
        assert [cooled(f) for f in (0.5, 1.0, 1.25, 1.5, 9.0)] == [1.0, 1.0, 0.5, 0.0, 0.0]
        assert [cooled.value(f, 0.2) for f in (1.25, 2.0)] == [0.1, 0.0]

    def test_beyond_the_budget_starts_from_where_the_schedule_is_flat(self):
        cooled = Linear(end=0.5).with_cooldown(2.0, over=1.0, shape="linear")
        assert [cooled(f) for f in (1.0, 1.5, 2.0, 2.5)] == [0.5, 0.5, 0.5, 0.25]

    def test_never_rises(self):
        cooled = Linear().with_cooldown(0.9, over=0.1, end=0.5)
        assert cooled(1.0) == pytest.approx(0.1)

    def test_resolves_what_it_cools(self):
        cooled = WarmupConstant(warmup=100).with_cooldown(0.5, over=0.1)
        assert cooled.resolve(RUN).boundaries() == {
            "warmup ends": 0.1,
            "cooldown starts": 0.5,
            "cooldown ends": 0.6,
        }

    def test_infinite_schedule_with_a_cooldown_is_the_endless_one_cooled_down(self):
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
            ({"at": -0.1, "over": 0.1}, "at must be a finite number from 0 on, got -0.1"),
            ({"at": 0.5, "over": 0.0}, "over must be positive, got 0.0"),
            ({"at": 0.5, "over": 0.1, "end": -1.0}, "end must be a finite number from 0 on"),
            ({"at": 0.5, "over": 0.1, "shape": "steep"}, "shape must be one of linear, cosine, "),
        ],
    )
    def test_refuses_bad_arguments(self, arguments, message: str):
        with pytest.raises(ValueError, match=message):
            Constant().with_cooldown(**arguments)


class TestSeesaw:
    def test_the_stable_phase_stays_as_it_is(self):
        seesaw = Seesaw(WarmupStableDecay(warmup="10%", decay="50%", cooldown="linear"))
        assert [seesaw(f) for f in (0.05, 0.1, 0.4)] == pytest.approx([0.5, 1.0, 1.0])
        assert [seesaw.batch_factor(f) for f in (0.05, 0.1, 0.4)] == [1.0, 1.0, 1.0]
        assert (seesaw(0.875), seesaw.batch_factor(0.875)) == pytest.approx((0.5, 4.0))

    def test_is_relative_to_the_peak_it_finds(self):
        seesaw = Seesaw(Product([Constant(0.36), WarmupLinear(warmup="50%")]))
        assert seesaw(0.25) == pytest.approx(0.18)
        assert seesaw(0.875) == pytest.approx(0.36 * 0.5)
        assert seesaw.batch_factor(0.875) == pytest.approx(4.0)

    def test_beyond_the_cap_the_rate_falls_in_full(self):
        seesaw = Seesaw(Linear(), max_batch_factor=4.0)
        assert (seesaw(0.75), seesaw.batch_factor(0.75)) == (0.5, 4.0)
        assert seesaw(0.9) == pytest.approx(0.1 * 2.0)
        assert seesaw.batch_factor(0.9) == seesaw.batch_factor(1.0) == 4.0
        assert seesaw(1.0) == 0.0
        for cap in (0.5, float("inf"), float("nan")):
            with pytest.raises(ValueError, match="max_batch_factor must be at least 1 and finite"):
                Seesaw(Linear(), max_batch_factor=cap)

    def test_a_schedule_that_is_zero_leaves_the_batch_alone(self):
        assert Seesaw(Constant(0.0)).batch_factor(0.5) == 1.0
        assert Seesaw(Constant(0.0))(0.5) == 0.0

    def test_batch_factor_is_flat_beyond_the_budget(self):
        assert Seesaw(Linear(end=0.25)).batch_factor(5.0) == 4.0

    def test_refuses_a_schedule_that_rises_again(self):
        from lightning_bigopt.schedules import CosineWithRestarts

        with pytest.raises(ValueError, match="schedule must only fall after its peak"):
            Seesaw(CosineWithRestarts(first_cycle="25%")).resolve(RUN)

    def test_resolves_its_inner_schedule(self):
        resolved = Seesaw(WarmupCosine(warmup=100)).resolve(RUN)
        assert resolved == Seesaw(WarmupCosine(warmup="10%"))


class TestResolving:
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
    def test_an_unresolved_duration_is_refused_with_the_way_out(self, schedule: Schedule):
        with pytest.raises(ValueError, match=r"must be resolved .*got '\d+ .*resolve\(horizon\)"):
            schedule(0.0)
        with pytest.raises(ValueError, match="must be resolved"):
            schedule.value(0.5, 0.1)
        resolved = schedule.resolve(RUN)
        assert resolved.resolve(RUN) == resolved
        assert 0.0 <= resolved(0.5) <= 1.0

    def test_the_original_stays_and_fits_a_longer_run(self):
        schedule = WarmupStableDecay(warmup=100, decay="20%")
        short = schedule.resolve(RUN)
        longer = schedule.resolve(Horizon.of_steps(2000))
        assert short.boundaries() == {"warmup ends": 0.1, "cooldown starts": 0.8}
        assert longer.boundaries() == {"warmup ends": 0.05, "cooldown starts": 0.8}
        assert schedule == WarmupStableDecay(warmup=100, decay="20%")

    def test_percent_in_a_recipe_is_of_the_whole_and_in_a_composition_of_the_rest(self):
        recipe = WarmupInverseSquareRoot(warmup="50%", timescale="20%").resolve(RUN)
        composed = Warmup("50%", InverseSquareRoot(timescale="40%")).resolve(RUN)
        for fraction in (0.2, 0.5, 0.7, 1.0):
            assert recipe(fraction) == pytest.approx(composed(fraction), abs=1e-12)

    def test_fast_dev_run_compresses(self):
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

    def test_without_a_known_plan_only_percent_and_the_clock_convert(self):
        blind = Horizon(clock="samples", budget=10_000)
        assert WarmupCosine(warmup="1000 samples").resolve(blind) == WarmupCosine(warmup="10%")
        with pytest.raises(ValueError, match="warmup must be in samples or percent here"):
            WarmupCosine(warmup=10).resolve(blind)
        with pytest.raises(ValueError, match="warmup must not be in epochs where the length"):
            WarmupCosine(warmup="1 epoch").resolve(blind)

    def test_periods_in_different_units_need_equal_updates(self):
        from lightning_bigopt.durations import Span
        from lightning_bigopt.schedules import Cyclic

        wave = Cyclic(up=10, down="200 samples")
        assert wave.resolve(RUN) == Cyclic(up="1%", down="2%")
        ramp = (Span(updates=50, samples=10), Span(updates=50, samples=30))
        with pytest.raises(ValueError, match="up and down must be in the same unit"):
            wave.resolve(Horizon(clock="steps", budget=100, spans=ramp))
