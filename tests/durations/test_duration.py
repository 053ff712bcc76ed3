"""Durations: parsing, errors and their strings."""

from __future__ import annotations

import pickle
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bigopt.durations import Duration


@pytest.mark.parametrize(
    ("written", "value", "unit"),
    [
        ("10%", 0.1, "fraction"),
        (" 12.5 % ", 0.125, "fraction"),
        ("100%", 1.0, "fraction"),
        ("1.1%", 0.011, "fraction"),
        ("0.1e1%", 0.01, "fraction"),
        (0.25, 0.25, "fraction"),
        (0.0, 0.0, "fraction"),
        (1.0, 1.0, "fraction"),
        (1, 1, "steps"),
        (0, 0, "steps"),
        (500, 500, "steps"),
        ("500 steps", 500, "steps"),
        ("1 step", 1, "steps"),
        ("1_000 steps", 1000, "steps"),
        ("10.steps", 10, "steps"),
        ("3 epochs", 3, "epochs"),
        ("0.5 epochs", 0.5, "epochs"),
        (".5 epochs", 0.5, "epochs"),
        ("1e6 samples", 1_000_000, "samples"),
        ("2e9tokens", 2_000_000_000, "tokens"),
        ("2B tokens", 2_000_000_000, "tokens"),
        ("2.3B tokens", 2_300_000_000, "tokens"),
        ("1.1T tokens", 1_100_000_000_000, "tokens"),
        ("469B tokens", 469_000_000_000, "tokens"),
        ("32K samples", 32_000, "samples"),
        ("3.2 M tokens", 3_200_000, "tokens"),
        ("+5 steps", 5, "steps"),
        ("500", 500, "steps"),
        ("1_000", 1000, "steps"),
        ("0.3", 0.3, "fraction"),
        ("1e-1", 0.1, "fraction"),
        (Duration(7, "epochs"), 7, "epochs"),
    ],
)
def test_parses(written, value, unit: str):
    length = Duration.parse(written)
    assert (length.value, length.unit) == (value, unit)
    assert type(length.value) is type(value)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (True, "must be a duration such as .* got True"),
        (None, "must be a duration such as .* got None"),
        ([10], r"must be a duration such as .* got \[10\]"),
        ("", "must be a duration such as"),
        ("ten steps", "must be a duration such as"),
        ("10 10 steps", "must be a duration such as"),
        (
            "10 sheep",
            "must have one of the units %, steps, .* minutes, hours, days, got '10 sheep'",
        ),
        ("10 Steps", "must be a duration such as"),
        ("2B", "must have one of the units"),
        ("_1 steps", "must be a duration such as"),
        (-1, "must be a non-negative number of steps, got -1"),
        ("-1", "must be a non-negative number of steps, got -1"),
        ("-1 steps", "must be non-negative and finite, got '-1 steps'"),
        (-0.1, r"must be a fraction in \[0, 1\] when it is a float, got -0.1"),
        (1.5, r"must be a fraction in \[0, 1\] .* got 1.5; write an int for steps, or a unit"),
        (float("nan"), r"must be a fraction in \[0, 1\]"),
        ("101%", "must be at most 100%, got '101%'"),
        ("1e999 steps", "must be non-negative and finite, got '1e999 steps'"),
        ("1e99999999999 tokens", "must be a duration such as"),
    ],
)
def test_invalid_text_raises(written, message: str):
    with pytest.raises(ValueError, match=f"^warmup {message}"):
        Duration.parse(written, name="warmup")


@pytest.mark.parametrize("value", [-1, float("inf"), float("nan")])
def test_invalid_values_raise(value: float):
    with pytest.raises(ValueError, match="value must be non-negative and finite, got"):
        Duration(value, "steps")


def test_unknown_unit_raises():
    with pytest.raises(ValueError, match=r"unit must be 'fraction', 'steps', .* got 'step'"):
        Duration(1, "step")


durations = st.one_of(
    st.floats(0.0, 1.0).map(lambda value: Duration(value, "fraction")),
    st.builds(
        Duration,
        st.integers(0, 10**15) | st.floats(0.0, 1e15),
        st.sampled_from(["steps", "epochs", "samples", "tokens"]),
    ),
)


@given(durations)
def test_string_of_a_duration_parses_as_the_same_duration(length: Duration):
    assert Duration.parse(str(length)) == length
    assert Duration.parse(length) is length
    assert pickle.loads(pickle.dumps(length)) == length


@given(st.decimals(0, 100, places=3))
def test_percentage_is_the_nearest_float(percent):
    assert Duration.parse(f"{percent}%").value == float(Fraction(percent) / 100)
