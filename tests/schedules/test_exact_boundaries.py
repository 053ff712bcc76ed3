"""Steps, restarts and boundaries fall on the update that integer arithmetic gives."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bigopt.durations import Horizon, Span
from lightning_bigopt.schedules import (
    Chain,
    Constant,
    CosineWithRestarts,
    Cyclic,
    InfiniteSchedule,
    MultiStep,
    PiecewiseLinear,
    StepDecay,
    Warmup,
    WarmupStableDecay,
)

runs = st.integers(1, 1500)


@given(runs, st.integers(1, 400))
def test_steps(total: int, every: int):
    factors = StepDecay(decay=0.5, every=every).values(total)
    assert factors == [0.5 ** (step // every) for step in range(total)]


def test_steps_of_every_length_up_to_200():
    for total in (360, 997):
        for every in range(1, 200):
            passed = [round(-math.log2(f)) for f in StepDecay(decay=0.5, every=every).values(total)]
            assert passed == [step // every for step in range(total)], (total, every)


@given(runs, st.integers(0, 3000), st.integers(1, 400))
def test_steps_after_a_warmup_count_from_its_end(total: int, warmup: int, every: int):
    warmup = min(warmup, total - 1)
    factors = Warmup(warmup, StepDecay(decay=0.5, every=every)).values(total)
    for step in range(warmup, total):
        assert factors[step] == 0.5 ** ((step - warmup) // every)


@given(runs, st.integers(1, 3000), st.integers(1, 400))
def test_steps_in_a_part_of_a_chain_end_with_it(total: int, first: int, every: int):
    first = min(first, total)
    steps = StepDecay(decay=0.5, every=every)
    factors = Chain([(first, steps), Constant(0.3)], seams="jump").values(total)
    expected = [0.5 ** (step // every) if step < first else 0.3 for step in range(total)]
    assert factors == expected


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.integers(1, 300))
def test_parts_of_a_chain_change_at_the_sum_of_their_updates(lengths: list[int], rest: int):
    levels = [(index % 3) / 4 for index in range(len(lengths) + 1)]
    parts = [(n, Constant(level)) for n, level in zip(lengths, levels, strict=False)]
    chain = Chain([*parts, Constant(levels[-1])], seams="jump")
    expected = [lv for n, lv in zip([*lengths, rest], levels, strict=True) for _ in range(n)]
    assert chain.values(sum(lengths) + rest) == expected


def test_parts_whose_fractions_round_to_another_update():
    chain = Chain([("10%", Constant(0.1)), ("20%", Constant(0.2)), Constant(0.3)], seams="jump")
    assert 0.1 + 0.2 > 300 / 1000, "the sum is rounded up"
    assert chain.values(1000)[299:301] == [0.2, 0.3]


@given(runs, st.lists(st.integers(0, 3000), min_size=1, max_size=6, unique=True))
def test_milestones(total: int, milestones: list[int]):
    milestones = [m for m in milestones if m <= total] or [total]
    schedule = MultiStep({step: step / 3000 for step in milestones})
    for step, found in enumerate(schedule.values(total)):
        passed = [m for m in milestones if m <= step]
        assert found == (max(passed) / 3000 if passed else 1.0)


@given(runs, st.integers(0, 3000), st.lists(st.integers(0, 3000), min_size=1, unique=True))
def test_milestones_after_a_warmup_count_from_its_end(total: int, warmup: int, later: list[int]):
    warmup = min(warmup, total - 1)
    milestones = [m for m in later if m <= total - warmup] or [total - warmup]
    factors = Warmup(warmup, MultiStep({m: m / 3000 for m in milestones})).values(total)
    for step in range(warmup, total):
        passed = [m for m in milestones if m <= step - warmup]
        assert factors[step] == (max(passed) / 3000 if passed else 1.0)


@given(runs, st.integers(1, 50), st.integers(1, 4))
def test_restarts(total: int, first: int, multiplier: int):
    factors = CosineWithRestarts(first_cycle=first, cycle_multiplier=multiplier).values(total)
    begin, length = 0, first
    while begin < total:
        assert factors[begin] == pytest.approx(1.0, abs=1e-12)
        last = begin + length - 1
        if last < total and length > 1:
            assert factors[last] < 0.76, "the last update of a cycle is at its foot"
        begin, length = begin + length, length * multiplier


def test_no_restart_at_the_end_of_the_budget():
    schedule = CosineWithRestarts(first_cycle="25%", end=0.1)
    assert schedule(1.0) == pytest.approx(0.1, abs=1e-12)
    assert schedule(7.0) == schedule(1.0)
    assert list(schedule.boundaries().values()) == [0.25, 0.5, 0.75]
    doubling = CosineWithRestarts(first_cycle=1 / 7, cycle_multiplier=2)
    assert doubling(1.0) == pytest.approx(0.0, abs=1e-12)
    assert len(doubling.boundaries()) == 2


@given(runs, st.integers(1, 60), st.integers(1, 60))
def test_minima_and_maxima_of_a_cycle(total: int, up: int, down: int):
    factors = Cyclic(low=0.0, up=up, down=down).values(total)
    for step in range(0, total, up + down):
        assert factors[step] == pytest.approx(0.0, abs=1e-9)
        if step + up < total:
            assert factors[step + up] == pytest.approx(1.0, abs=1e-9)


@given(runs, st.integers(0, 3000), st.integers(0, 3000))
def test_wsd_is_exactly_one_between_its_boundaries(total: int, warmup: int, decay: int):
    warmup = min(warmup, total - 1)
    decay = min(decay, total - warmup)
    for cooldown in ("linear", "1-sqrt"):
        factors = WarmupStableDecay(warmup=warmup, decay=decay, cooldown=cooldown).values(total)
        assert all(factors[step] == 1.0 for step in range(warmup, total - decay))
        if decay:
            assert factors[total - decay] == 1.0
        assert all(factors[step] < 1.0 for step in range(warmup))
        assert all(factors[step] < 1.0 for step in range(total - decay + 1, total))


@given(runs, st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 1000))
def test_infinite_schedule_with_any_lengths(total: int, warmup: int, decay: int, cooldown: int):
    warmup = min(warmup, total)
    decay = min(decay, total - warmup)
    cooldown = min(cooldown, total - warmup - decay)
    schedule = InfiniteSchedule(warmup=warmup, decay=decay, plateau=0.5, cooldown=cooldown)
    factors = schedule.values(total)
    plateau = range(warmup + decay, total - cooldown)
    assert all(factors[step] == pytest.approx(0.5, abs=1e-12) for step in plateau)
    assert len(factors) == total


@given(runs, st.integers(1, 3000))
def test_points_of_a_piecewise_schedule_are_exact(total: int, corner: int):
    corner = min(corner, total)
    assert PiecewiseLinear({0: 0.25, corner: 0.75}).resolve(Horizon.of_steps(total))(
        corner / total
    ) == pytest.approx(0.75, abs=1e-15)


# -------------------------------------------------------------------------------- growing batches


def growing_run(clock: str = "steps") -> tuple[Horizon, list[int]]:
    """Returns a run whose batch doubles twice, and the samples consumed before each update."""
    sizes = [16] * 100 + [32] * 50 + [64] * 150
    spans = tuple([Span(updates=n, samples=b) for n, b in ((100, 16), (50, 32), (150, 64))])
    consumed = [sum(sizes[:step]) for step in range(len(sizes) + 1)]
    budget = {"steps": len(sizes), "samples": consumed[-1]}[clock]
    return Horizon(clock=clock, budget=budget, spans=spans, batches_per_epoch=20), consumed


@pytest.mark.parametrize("every", [16, 64, 160, 1000, 3200, 9999, 12800, 10**6])
def test_steps_in_samples_with_a_growing_batch(every: int):
    horizon, consumed = growing_run()
    resolved = StepDecay(decay=0.9, every=f"{every} samples").resolve(horizon)
    for step in range(300):
        assert resolved(step / 300) == pytest.approx(0.9 ** (consumed[step] // every), rel=1e-12)


@pytest.mark.parametrize("first", [100, 1600, 2500])
def test_restarts_in_samples_with_a_growing_batch(first: int):
    horizon, consumed = growing_run()
    schedule = CosineWithRestarts(first_cycle=f"{first} samples", cycle_multiplier=2.0)
    resolved = schedule.resolve(horizon)
    alone = schedule.resolve(Horizon(clock="samples", budget=consumed[-1]))
    for step in range(300):
        expected = alone(consumed[step] / consumed[-1])
        assert resolved(step / 300) == pytest.approx(expected, abs=1e-9)
    restarts = [round(at * 300, 6) for at in resolved.boundaries().values()]
    assert restarts == sorted(restarts)
    assert len(restarts) == len(alone.boundaries())


def test_steps_in_samples_after_a_warmup_in_samples_with_a_growing_batch():
    horizon, consumed = growing_run()
    schedule = Warmup("2000 samples", StepDecay(decay=0.9, every="1000 samples"))
    resolved = schedule.resolve(horizon)
    for step in range(300):
        if consumed[step] >= 2000:
            expected = 0.9 ** ((consumed[step] - 2000) // 1000)
            assert resolved(step / 300) == pytest.approx(expected, rel=1e-12)


def test_budget_in_samples_does_not_depend_on_the_batch():
    horizon, consumed = growing_run("samples")
    plain = Horizon(clock="samples", budget=consumed[-1])
    schedules = [
        WarmupStableDecay(warmup="1000 samples", decay="3000 samples"),
        StepDecay(decay=0.5, every="777 samples"),
        Cyclic(up="500 samples"),
    ]
    for schedule in schedules:
        assert schedule.resolve(horizon) == schedule.resolve(plain)


def test_decay_in_samples_is_counted_from_the_end_with_a_growing_batch():
    horizon, consumed = growing_run()
    resolved = WarmupStableDecay(warmup="800 samples", decay="6400 samples").resolve(horizon)
    assert resolved.boundaries() == pytest.approx(
        {"warmup ends": 50 / 300, "cooldown starts": 200 / 300}
    )
    assert consumed[300] - consumed[200] == 6400


def test_epochs_with_partial_windows():
    """7 batches an epoch, 3 per update: 2 whole windows and a partial one in each of 4 epochs."""
    spans = (Span(updates=2, batches=3), Span(updates=1, batches=1)) * 4
    horizon = Horizon(clock="steps", budget=12, spans=spans, batches_per_epoch=7)
    resolved = StepDecay(decay=0.5, every="1 epoch").resolve(horizon)
    assert [resolved(step / 12) for step in range(12)] == [0.5 ** (s // 3) for s in range(12)]
