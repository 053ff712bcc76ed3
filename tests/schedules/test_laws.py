"""Properties that every schedule has, with random arguments."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_bigopt import schedules
from lightning_bigopt.durations import Horizon
from lightning_bigopt.schedules import Chain, Schedule, Seesaw, Warmup, WarmupStableDecay
from tests.schedules import strategies as some

ROUNDING = 1e-12
NAMES = {name: getattr(schedules, name) for name in schedules.__all__}


@given(some.anything, some.moments)
def test_bounded_by_zero_and_the_peak(schedule: Schedule, moment: float):
    assert 0.0 <= schedule(moment) <= 1.0 + ROUNDING


@given(some.anything, st.floats(1.0, 1e9))
def test_flat_beyond_the_budget(schedule: Schedule, late: float):
    assert schedule(late) == schedule(1.0)


@given(some.anything, st.floats(max_value=0.0, exclude_max=True) | st.just(float("nan")))
def test_negative_fraction_raises(schedule: Schedule, early: float):
    if schedule.is_constant and math.isnan(early):  # the fraction of an unknown budget
        assert schedule(early) == schedule(0.0)
        return
    with pytest.raises(ValueError, match="fraction must be non-negative, got"):
        schedule(early)


@given(some.falling, some.moments, some.moments)
def test_decay_never_rises(schedule: Schedule, one: float, other: float):
    assert schedule(max(one, other)) <= schedule(min(one, other)) + ROUNDING


@given(some.smooth)
def test_no_jump_at_a_boundary(schedule: Schedule):
    assert_continuous(schedule)


@given(some.share, some.smooth, some.rise, some.factor)
def test_no_jump_after_a_warmup(length: float, inner: Schedule, shape: str, start: float):
    assert_continuous(Warmup(length, inner, shape=shape, start=start))


@given(some.warmed_up, some.moments, some.share, some.fall, some.factor)
def test_no_jump_into_a_cooldown(
    schedule: Schedule, at: float, over: float, shape: str, end: float
):
    cooled = schedule.with_cooldown(at, over=over, shape=shape, end=end)
    assert_continuous(cooled)
    assert cooled(at + over) == pytest.approx(min(end, schedule(at)), abs=1e-12)
    assert cooled(at / 2) == schedule(at / 2)
    assert cooled(5.0) == cooled(at + over)


@given(some.share, some.warmed_up, some.falling)
def test_no_jump_in_a_chain_that_scales(length: float, first: Schedule, second: Schedule):
    if first(1.0) <= second(0.0) and second(0.0):
        assert_continuous(Chain([(length, first), second], seams="scale"))


def assert_continuous(schedule: Schedule) -> None:
    """Over a distance of 2e-11, even a square root over 1e-4 changes by less than 1e-3."""
    for name, at in schedule.boundaries().items():
        if 1e-6 < at < 1 - 1e-6:
            before, after = schedule(at - 1e-11), schedule(at + 1e-11)
            assert abs(before - after) < 1e-3, name


@given(some.anything)
def test_equality_hash_and_copies(schedule: Schedule):
    twins = [
        copy.deepcopy(schedule),
        pickle.loads(pickle.dumps(schedule)),
        eval(repr(schedule), NAMES),
    ]
    schedule(0.5)  # fills the caches, which equality ignores
    twins.append(pickle.loads(pickle.dumps(schedule)))
    for twin in twins:
        assert twin == schedule
        assert hash(twin) == hash(schedule)
        assert twin(0.37) == schedule(0.37)


@given(some.anything, st.integers(1, 500))
def test_values_are_the_factors_of_the_updates(schedule: Schedule, total: int):
    resolved = schedule.resolve(Horizon.of_steps(total))
    assert schedule.values(total) == [resolved(step / total) for step in range(total)]
    with_base = schedule.values(total, base=0.3)
    assert with_base == [0.3 * resolved(step / total) for step in range(total)]


@given(some.anything, some.moments)
def test_schedule_in_fractions_needs_no_resolving(schedule: Schedule, moment: float):
    resolved = schedule.resolve(Horizon.of_steps(100))
    assert resolved == schedule
    assert resolved(moment) == schedule(moment)


@given(some.warmed_up | some.composed)
def test_boundaries_lie_in_the_budget(schedule: Schedule):
    assert all(0.0 <= at <= 1.0 + ROUNDING for at in schedule.boundaries().values())


@given(st.integers(2, 2000), st.data())
def test_equal_lengths_in_any_unit_give_the_same_factors(total: int, data: st.DataObject):
    warmup = data.draw(st.integers(0, total - 1))
    decay = data.draw(st.integers(0, total - warmup))
    horizon = Horizon.of_steps(total, samples_per_step=32, tokens_per_step=1024, steps_per_epoch=10)
    reference = WarmupStableDecay(warmup=warmup / total, decay=decay / total)
    for written in (
        {"warmup": warmup, "decay": decay},
        {"warmup": f"{32 * warmup} samples", "decay": f"{1024 * decay} tokens"},
        {"warmup": f"{warmup / 10} epochs", "decay": f"{decay} steps"},
    ):
        resolved = WarmupStableDecay(**written).resolve(horizon)
        for step in {0, warmup, total - decay, total - 1}:
            moment = step / total
            assert resolved(moment) == pytest.approx(reference(moment), abs=1e-12)


@given(some.warmup_cosine | some.stable | some.falling, some.moments)
def test_seesaw_keeps_learning_rate_squared_times_batch_factor(inner: Schedule, moment: float):
    """sqrt(alpha) * sqrt(1 / alpha) * alpha = alpha: lr squared times batch does not change."""
    seesaw = Seesaw(inner)
    peak = max(inner(at) for at in {0.0, *inner.boundaries().values()})
    if inner(moment) > 0 and moment > 0 and seesaw.batch_factor(moment) > 1:
        rate, batch = seesaw(moment), seesaw.batch_factor(moment)
        if batch < seesaw.max_batch_factor:
            assert rate**2 * batch == pytest.approx(peak**2, rel=1e-9)
        assert rate / batch**0.5 == pytest.approx(inner(moment), rel=1e-9)


@settings(max_examples=20)
@given(some.anything)
def test_type_hints_can_be_read(schedule: Schedule):
    import typing

    assert typing.get_type_hints(type(schedule).__init__)
