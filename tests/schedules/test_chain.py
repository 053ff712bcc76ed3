"""Chain: positions of its parts, jumps between them, and errors."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from lightning_bigopt.durations import Horizon
from lightning_bigopt.schedules import (
    Chain,
    Constant,
    Linear,
    Schedule,
    WarmupConstant,
)

RUN = Horizon.of_steps(1000, samples_per_step=10, steps_per_epoch=100)


@dataclass(frozen=True, kw_only=True)
class Position(Schedule):
    """A schedule whose factor is the position at which it is evaluated."""

    def factor(self, fraction: float) -> float:
        return fraction


def test_each_part_is_evaluated_from_zero_to_one():
    chain = Chain([("30%", Position()), (200, Position()), Position()], seams="jump").resolve(RUN)
    seen = [chain(step / 1000) for step in (0, 150, 299, 300, 400, 500, 750, 1000)]
    expected = [0.0, 0.5, 299 / 300, 0.0, 0.5, 0.0, 0.5, 1.0]
    assert seen == pytest.approx(expected, abs=1e-12)


def test_durations_inside_a_part_refer_to_the_part():
    parts = [("20%", Constant()), ("40%", WarmupConstant(warmup="25%")), Linear()]
    percent = Chain(parts, seams="jump").resolve(RUN)
    assert percent.boundaries()["part 2: warmup ends"] == pytest.approx(0.2 + 0.4 * 0.25)
    parts[1] = ("40%", WarmupConstant(warmup="150 steps"))
    steps = Chain(parts, seams="jump").resolve(RUN)
    assert steps.boundaries()["part 2: warmup ends"] == pytest.approx(0.35)
    parts[1] = ("40%", WarmupConstant(warmup="1 epoch"))
    epochs = Chain(parts, seams="jump").resolve(RUN)
    assert epochs.boundaries()["part 2: warmup ends"] == pytest.approx(0.3)


def test_jump_raises_unless_allowed():
    with pytest.raises(ValueError, match=r"parts must meet at their seams, got a jump from 0 "):
        Chain([("50%", Linear()), Linear()]).resolve(RUN)
    with pytest.raises(ValueError, match="seams='jump'"):
        Chain([("50%", Linear()), Linear()])(0.0)
    chain = Chain([("50%", Linear()), Linear()], seams="jump")
    assert (chain(0.5 - 1e-6), chain(0.5)) == (pytest.approx(0.0, abs=1e-5), 1.0)


def test_scaled_parts_begin_where_the_previous_one_ended():
    chain = Chain(
        [("25%", Linear(end=0.5)), ("25%", Linear(end=0.5)), Linear(start=0.2)], seams="scale"
    )
    assert [chain(f) for f in (0, 0.25, 0.5, 0.75, 1)] == [1.0, 0.5, 0.25, 0.125, 0.0]


def test_scaled_part_that_begins_at_zero_raises():
    with pytest.raises(ValueError, match="parts must meet at their seams"):
        Chain([("50%", Constant()), Linear(start=0.0, end=1.0)], seams="scale").resolve(RUN)


def test_parts_of_length_zero_are_skipped():
    chain = Chain([(0, Constant(0.1)), ("100%", Linear()), Constant(0.7)]).resolve(RUN)
    assert [chain(f) for f in (0.0, 0.5, 1.0)] == [1.0, 0.5, 0.0]


def test_parts_longer_than_the_budget_raise():
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
def test_invalid_parts_raise(parts, message: str):
    with pytest.raises(ValueError, match=message):
        Chain(parts)


def test_lists_and_tuples_give_equal_chains():
    as_lists = Chain([["30%", Constant()], Linear()])
    assert as_lists == Chain((("30%", Constant()), Linear()))
    assert hash(as_lists) == hash(Chain([(0.3, Constant()), Linear()]))
