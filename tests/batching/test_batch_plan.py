"""BatchPlan: micro-batch, accumulation and processes for a global batch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bigopt.batching import (
    BatchContext,
    BatchSizeRamp,
    BatchSizeSteps,
    ConstantBatchSize,
    FullBatch,
    SingleSample,
    check_explicit_sizes,
    plan_at,
    plan_update,
)
from lightning_bigopt.durations import Progress

SIZES = st.integers(1, 500)
SMALL = st.integers(1, 9)


@given(times=SMALL, micro=SMALL, world=SMALL)
def test_size_that_fits_is_planned_exactly(times, micro, world):
    plan = plan_update(times * micro * world, micro_batch_size=micro, world_size=world)
    assert (plan.micro_batch_size, plan.accumulate, plan.world_size) == (micro, times, world)
    assert plan.global_batch_size == times * micro * world


@given(size=SIZES, micro=SMALL, world=SMALL)
def test_nearest_and_up_against_a_search_over_all_multiples(size, micro, world):
    grain = micro * world
    multiples = range(0, size + 2 * grain, grain)
    nearest = max(multiples, key=lambda multiple: (-abs(multiple - size), multiple))

    def planned(rounding):
        return plan_update(
            size, micro_batch_size=micro, world_size=world, rounding=rounding
        ).global_batch_size

    assert planned("up") == min(m for m in multiples if m >= size)
    if nearest:
        assert planned("nearest") == nearest
    else:
        with pytest.raises(ValueError, match=r"must be at least"):
            planned("nearest")


@given(size=SIZES, most=st.integers(1, 40), world=SMALL)
def test_chosen_micro_batch_is_the_largest_divisor_that_fits(size, most, world):
    plan = plan_update(size * world, max_micro_batch_size=most, world_size=world)
    assert plan.global_batch_size == size * world
    divisors = [m for m in range(1, size + 1) if size % m == 0 and m <= most]
    assert plan.micro_batch_size == divisors[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"global_batch_size": 250},
            r"of micro_batch_size × processes = 8 × 2 = 16, got 250; write 240 or 256, or change",
        ),
        (
            {"global_batch_size": 8},
            r"at least .* = 8 × 2 = 16, got 8; write 16, or set micro_batch_size to 4",
        ),
        ({"global_batch_size": 1}, r"got 1; write 16, or use 1 process"),
        ({"global_batch_size": 0}, r"global_batch_size must be a positive number of samples"),
        ({"global_batch_size": 7, "rounding": "nearest"}, r"must be at least .*got 7"),
        ({"global_batch_size": 16, "world_size": 0}, r"world_size must be a positive"),
        ({"global_batch_size": 16, "micro_batch_size": 0}, r"micro_batch_size must be a positive"),
        ({"global_batch_size": 16, "micro_batch_size": None}, r"must be given, and not both"),
        ({"global_batch_size": 16, "max_micro_batch_size": 4}, r"must be given, and not both"),
        (
            {"global_batch_size": 5, "micro_batch_size": None, "max_micro_batch_size": 4},
            r"got 5; write 4 or 6",
        ),
    ],
)
def test_error_names_the_nearest_sizes_that_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_update(**{"micro_batch_size": 8, "world_size": 2, **arguments})


def test_explicit_sizes_must_fit_and_others_are_rounded():
    ramp = BatchSizeRamp(start=16, end=64, over="10 steps")
    check_explicit_sizes(ramp, micro_batch_size=8, world_size=2)
    sizes = [
        plan_at(
            ramp, progress=Progress(fraction=0.0, steps=n), micro_batch_size=8, world_size=2
        ).global_batch_size
        for n in range(11)
    ]
    ideals = [16 + 48 * n // 10 for n in range(11)]
    assert sizes == [int(ideal / 16 + 0.5) * 16 for ideal in ideals]
    for policy, name in (
        (ConstantBatchSize(40), "size"),
        (BatchSizeSteps({"0%": 32, "50%": 40}), r"sizes\['50%'\]"),
        (BatchSizeRamp(start=40, end=64, over="10%"), "start"),
        (BatchSizeRamp(start=32, end=40, over="10%"), "end"),
        (SingleSample(), r"SingleSample\(\)"),
    ):
        with pytest.raises(ValueError, match=rf"^{name} must be"):
            check_explicit_sizes(policy, micro_batch_size=8, world_size=2)
    with pytest.raises(ValueError, match=r"the global batch of BatchSizeSteps must be a multiple"):
        plan_at(
            BatchSizeSteps({"0%": 32, "50%": 40}),
            progress=Progress(fraction=0.5),
            micro_batch_size=8,
            world_size=2,
        )


def test_full_batch_is_rounded_up_to_hold_the_epoch():
    context = BatchContext(samples_per_epoch=101)
    plan = plan_at(
        FullBatch(),
        progress=Progress(fraction=0.0),
        micro_batch_size=10,
        world_size=2,
        context=context,
    )
    assert plan.accumulate == 6


def test_plan_prints_as_a_product():
    plan = plan_update(256, micro_batch_size=8, world_size=2)
    assert str(plan) == "256 = micro-batch 8 × accumulation 16 × processes 2"
