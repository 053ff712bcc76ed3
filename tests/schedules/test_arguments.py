"""Arguments of schedules: accepted forms, repr, and error messages."""

from __future__ import annotations

import typing
from dataclasses import FrozenInstanceError, dataclass, fields

import pytest

from lightning_bigopt import schedules
from lightning_bigopt.durations import Duration, Horizon
from lightning_bigopt.schedules import (
    REX,
    Chain,
    Constant,
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
    Schedule,
    StepDecay,
    TriStage,
    Warmup,
    WarmupCosine,
    WarmupInverseSquareRoot,
    WarmupLinear,
    WarmupStableDecay,
)

FACTOR = "must be non-negative and finite, got"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(-1.0), f"level {FACTOR} -1.0"),
        (
            lambda: Constant("0.5"),
            r"level must be a non-negative and finite number, got '0.5'; write 0.5 w",
        ),
        (lambda: Linear(start=float("inf")), f"start {FACTOR} inf"),
        (lambda: Cosine(end=-0.1), f"end {FACTOR} -0.1"),
        (lambda: Polynomial(power=0), "power must be positive and finite, got 0"),
        (lambda: REX(end=float("nan")), f"end {FACTOR} nan"),
        (lambda: Exponential(decay=0.0), r"decay must be in \(0, 1\], got 0.0"),
        (lambda: Exponential(every=0), "every must be longer than zero, got '0 steps'"),
        (lambda: StepDecay(decay=1.5), r"decay must be in \(0, 1\], got 1.5"),
        (lambda: StepDecay(every="0%"), "every must be longer than zero, got '0%'"),
        (lambda: Power(0.5), r"exponent must be in \(-inf, 0\], got 0.5"),
        (lambda: InverseSquareRoot(timescale=-5), "timescale must be a non-negative number of s"),
        (lambda: MultiStep({}), r"milestones must map durations to factors, got \{\}"),
        (lambda: MultiStep(0.3), "milestones must map durations to factors, got 0.3"),
        (lambda: MultiStep({"30%": 0.1, 0.3: 0.2}), "milestones must contain every duration once"),
        (lambda: MultiStep({"30%": -0.1}), rf"milestones\['30%'\] {FACTOR} -0.1"),
        (
            lambda: MultiStep([0.3, 0.1]),
            r"milestones must contain pairs \(duration, factor\), got 0.3",
        ),
        (lambda: PiecewiseLinear({"bad": 0.1}), "a key of points must be a duration such as"),
        (lambda: OneCycle(shape="cos"), "shape must be 'cosine' or 'linear', got 'cos'"),
        (lambda: OneCycle(warmup=1.2), r"warmup must be a fraction in \[0, 1\] when it is a float"),
        (lambda: Cyclic(low=1.5), r"low must be in \[0, 1\], got 1.5; the peak is 1"),
        (
            lambda: Cyclic(mode="square"),
            "mode must be 'triangular', 'triangular2' or 'exp_range', g",
        ),
        (
            lambda: CosineWithRestarts(cycle_multiplier=0.5),
            r"cycle_multiplier must be in \[1, inf\), g",
        ),
        (lambda: CosineWithRestarts(cycle_decay=0), r"cycle_decay must be in \(0, 1\], got 0"),
        (lambda: TriStage(end=0.0), r"end must be in \(0, 1\], got 0.0; an exponential"),
        (lambda: TriStage(hold="60%"), r"warmup \+ hold \+ decay must be at most 100%, got"),
        (lambda: Noam(warmup=0), "warmup must be longer than zero, got '0 steps'"),
        (lambda: WarmupLinear(start=-1), f"start {FACTOR} -1"),
        (lambda: WarmupCosine(end=1.5), r"end must be in \[0, 1\], got 1.5; the peak is 1"),
        (lambda: WarmupCosine(warmup_shape="step"), "warmup_shape must be 'linear', 'cosine' or"),
        (lambda: WarmupCosine(warmup="120%"), "warmup must be at most 100%, got '120%'"),
        (lambda: WarmupCosine(warmup=None), "warmup must be a duration such as"),
        (lambda: WarmupInverseSquareRoot(warmup=0), "timescale must be longer than zero"),
        (lambda: WarmupStableDecay(cooldown="sqrt"), "cooldown must be 'linear', 'cosine', '1-s"),
        (
            lambda: WarmupStableDecay(warmup="70%", decay="40%"),
            r"warmup \+ decay must be at most 100%, got warmup='70%' \+ decay='40%'; shorten one",
        ),
        (lambda: InfiniteSchedule(plateau=1.1), r"plateau must be in \[0, 1\], got 1.1; the peak"),
        (
            lambda: InfiniteSchedule(warmup="50%", decay="30%", cooldown="30%"),
            r"warmup \+ decay \+ cooldown must be at most 100%",
        ),
        (lambda: Warmup("10%", 0.5), r"schedule must be a Schedule, got 0.5; for instance Cosine"),
        (
            lambda: Warmup("10%", Linear(), shape="up"),
            "shape must be 'linear', 'cosine' or '1-sqrt', got 'up'",
        ),
        (
            lambda: Chain([Linear()], seams="smooth"),
            "seams must be 'raise', 'jump' or 'scale', got",
        ),
    ],
)
def test_invalid_arguments_raise_with_constraint_and_value(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            WarmupCosine(warmup=101),
            r"warmup must be at most the whole budget \(100 steps\)",
        ),
        (WarmupStableDecay(warmup=50, decay="60%"), "got warmup='50 steps' .* decay='60%'"),
        (MultiStep({50: 0.5, 101: 0.1}), r"milestones must be at most .* got '101 steps'"),
        (MultiStep({50: 0.5, "50%": 0.1}), "milestones must contain every duration once"),
        (OneCycle(warmup="2 epochs"), "warmup must not be in epochs if the length of an epoch"),
        (StepDecay(every="5 samples"), "every must be in steps or percent here, got '5 samples'"),
        (PiecewiseLinear({"9 tokens": 0.5}), "points must be in steps or percent here"),
    ],
)
def test_length_that_does_not_fit_raises_when_resolved(schedule: Schedule, message: str):
    with pytest.raises(ValueError, match=message):
        schedule.resolve(Horizon.of_steps(100))


def test_equal_durations_in_different_forms_give_equal_schedules():
    assert WarmupStableDecay(warmup="2%") == WarmupStableDecay(warmup=0.02)
    assert WarmupStableDecay(warmup="2 %") == WarmupStableDecay(warmup=Duration(0.02, "fraction"))
    assert WarmupStableDecay(warmup=500) == WarmupStableDecay(warmup="500 steps")
    assert WarmupStableDecay(decay="2e9 tokens") == WarmupStableDecay(decay="2B tokens")
    assert len({WarmupCosine(warmup="1.1%"), WarmupCosine(warmup=0.011)}) == 1
    assert WarmupStableDecay(warmup=500) != WarmupStableDecay(warmup="50%")


def test_equal_tables_in_different_forms_give_equal_schedules():
    by_dict = MultiStep({"60%": 0.01, "30%": 0.1})
    assert by_dict == MultiStep([(0.3, 0.1), ["60%", 0.01]])
    assert hash(by_dict) == hash(MultiStep((("30%", 0.1), (0.6, 0.01))))
    assert repr(by_dict) == "MultiStep(milestones=(('30%', 0.1), ('60%', 0.01)))"


def test_repr_shows_arguments_as_written():
    schedule = WarmupStableDecay(warmup=500, decay="20%")
    assert repr(schedule) == (
        "WarmupStableDecay(warmup='500 steps', warmup_shape='linear', start=0.0, decay='20%', "
        "cooldown='1-sqrt', end=0.0)"
    )
    assert eval(repr(schedule)) == schedule


@pytest.mark.parametrize("name", sorted(set(schedules.__all__) - {"Schedule"}))
def test_every_schedule_is_frozen_and_has_readable_types(name: str):
    kind = getattr(schedules, name)
    hints = typing.get_type_hints(kind.__init__)
    assert {field.name for field in fields(kind)} <= set(hints)
    some = Constant() if name not in {"Chain", "Clamp", "Product", "Seesaw", "Warmup"} else None
    if some is not None:
        made = kind()
        with pytest.raises(FrozenInstanceError):
            setattr(made, fields(made)[0].name, 1.0)


def test_only_the_first_field_is_positional():
    assert Constant(0.5) == Constant(level=0.5)
    assert Power(-1.0) == Power(exponent=-1.0)
    assert MultiStep({"1%": 0.5}) == MultiStep(milestones={"1%": 0.5})
    with pytest.raises(TypeError, match="without a name"):
        Cosine(0.5, 0.1)
    with pytest.raises(TypeError, match="without a name"):
        WarmupCosine("2%")


@dataclass(frozen=True, kw_only=True)
class OneMinusSquare(Schedule):
    """A user's schedule, in place of a LambdaLR."""

    _parts = ("hold",)

    hold: Duration | int | float | str = 0.0

    def factor(self, fraction: float) -> float:
        held = self._share("hold")
        return 1.0 if fraction < held else 1.0 - ((fraction - held) / (1.0 - held)) ** 2


def test_user_schedule_needs_one_method():
    schedule = OneMinusSquare(hold=50)
    assert schedule == OneMinusSquare(hold="50 steps")
    assert schedule.values(100)[:51] == [1.0] * 51
    assert schedule.resolve(Horizon.of_steps(100))(0.75) == 0.75
    assert Warmup("10%", OneMinusSquare())(0.55) == pytest.approx(0.75)
    with pytest.raises(ValueError, match=r"OneMinusSquare\.hold must be resolved"):
        schedule(0.5)
    with pytest.raises(ValueError, match="hold must be at most the whole budget"):
        schedule.values(40)


def test_values_of_zero_updates_raise():
    with pytest.raises(ValueError, match="total_steps must be a positive integer, got 0"):
        Linear().values(0)


def test_values_with_a_base():
    assert Linear().values(4, base=0.125) == [0.125, 0.09375, 0.0625, 0.03125]
