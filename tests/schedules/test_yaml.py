"""Schedules in YAML, also nested: parsed, saved, and parsed again."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from jsonargparse import ArgumentParser, Namespace

from lightning_bigopt import schedules
from lightning_bigopt.durations import Duration
from lightning_bigopt.schedules import (
    Chain,
    Clamp,
    Constant,
    Cosine,
    Exponential,
    Linear,
    MultiStep,
    PiecewiseLinear,
    Product,
    Schedule,
    Seesaw,
    StepDecay,
    Warmup,
    WarmupCosine,
    WarmupStableDecay,
)
from tests.schedules import strategies as some

PLAIN = {*schedules.__all__} - {"Chain", "Clamp", "Product", "Schedule", "Seesaw", "Warmup"}


class Callback:
    """Takes schedules as the callbacks do."""

    def __init__(self, schedule: Schedule, groups: dict[str, Schedule] | None = None) -> None:
        self.schedule = schedule
        self.groups = groups


def parser() -> ArgumentParser:
    made = ArgumentParser(exit_on_error=False)
    made.add_class_arguments(Callback, "callback")
    return made


def read_and_compare(text: str) -> Callback:
    """Parses, saves, parses again, and compares the schedules."""
    made = parser()
    config = made.parse_string(text)
    first = instantiate(made, config)
    again = instantiate(made, made.parse_string(made.dump(config)))
    assert again.schedule == first.schedule
    assert again.groups == first.groups
    return first


def instantiate(made: ArgumentParser, config: Namespace) -> Callback:
    method = getattr(made, "instantiate", None) or made.instantiate_classes
    callback = method(config).callback
    assert isinstance(callback, Callback)
    return callback


def as_plain_data(value: Any) -> Any:
    """Returns a schedule as plain data for YAML."""
    if isinstance(value, Schedule):
        arguments = {f.name: as_plain_data(getattr(value, f.name)) for f in fields(value)}
        return {"class_path": type(value).__name__, "init_args": arguments}
    if isinstance(value, Duration):
        return str(value)
    if isinstance(value, tuple):
        return [as_plain_data(item) for item in value]
    return value


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_schedule_by_name_has_its_defaults(name: str):
    made = getattr(schedules, name)()
    assert read_and_compare(f"callback: {{schedule: {{class_path: {name}}}}}").schedule == made
    full = f"callback: {{schedule: {{class_path: lightning_bigopt.schedules.{name}}}}}"
    assert read_and_compare(full).schedule == made


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(some.simple | some.composed)
def test_any_schedule_is_equal_after_yaml(schedule: Schedule):
    text = yaml.safe_dump({"callback": {"schedule": as_plain_data(schedule)}})
    assert read_and_compare(text).schedule == schedule


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        ("1", "1 steps"),
        ("1.0", "100%"),
        ("0.5", "50%"),
        ("1e-1", "10%"),
        ("250", "250 steps"),
        ("'250'", "250 steps"),
        ("3 epochs", "3 epochs"),
        ("1e6 samples", "1000000 samples"),
        ("2B tokens", "2000000000 tokens"),
        ("12.5%", "12.5%"),
        ("{value: 10, unit: steps}", "10 steps"),
    ],
)
def test_duration_in_yaml_equals_that_in_python(every: str, expected: str):
    text = f"callback: {{schedule: {{class_path: Exponential, init_args: {{every: {every}}}}}}}"
    assert read_and_compare(text).schedule == Exponential(every=expected)


def test_table_is_a_dict_in_yaml():
    text = """
    callback:
      schedule:
        class_path: MultiStep
        init_args: {milestones: {30%: 0.5, 0.6: 0.1}}
      groups:
        head:
          class_path: PiecewiseLinear
          init_args: {points: {0%: 0.0, 100 steps: 1.0, 500: 1e-1}}
    """
    callback = read_and_compare(text)
    assert callback.schedule == MultiStep({"30%": 0.5, "60%": 0.1})
    assert callback.groups == {"head": PiecewiseLinear({"0%": 0.0, 100: 1.0, 500: 0.1})}


def test_nested_chain():
    text = """
    callback:
      schedule:
        class_path: lightning_bigopt.schedules.Chain
        init_args:
          seams: scale
          parts:
          - - 30%
            - class_path: Warmup
              init_args:
                duration: 100
                schedule: {class_path: Constant}
          - [200 steps, {class_path: Cosine, init_args: {end: 0.5}}]
          - class_path: Clamp
            init_args:
              low: 0.1
              schedule:
                class_path: Product
                init_args:
                  schedules:
                  - class_path: Linear
                  - {class_path: StepDecay, init_args: {every: 1 epoch}}
    """
    last = Clamp(Product([Linear(), StepDecay(every="1 epoch")]), low=0.1)
    assert read_and_compare(text).schedule == Chain(
        [("30%", Warmup(100, Constant())), (200, Cosine(end=0.5)), last], seams="scale"
    )


def test_schedule_on_the_command_line():
    made = parser()
    arguments = [
        "--callback.schedule=WarmupStableDecay",
        "--callback.schedule.warmup=500",
        "--callback.schedule.decay=2e9 tokens",
        "--callback.schedule.cooldown=linear",
    ]
    callback = instantiate(made, made.parse_args(arguments))
    assert callback.schedule == WarmupStableDecay(warmup=500, decay="2e9 tokens", cooldown="linear")


def test_seesaw_around_a_recipe():
    text = "callback: {schedule: {class_path: Seesaw, init_args: {schedule: WarmupCosine}}}"
    assert read_and_compare(text).schedule == Seesaw(WarmupCosine())


def test_invalid_values_raise_with_their_names():
    text = "callback: {schedule: {class_path: WarmupCosine, init_args: {warmup: 10 sheep}}}"
    with pytest.raises(ValueError, match="warmup must have one of the units"):
        instantiate(parser(), parser().parse_string(text))


def test_clamp_of_version_0_1_loads_and_one_with_unit_lr_raises():
    text = "callback: {{schedule: {{class_path: Clamp, init_args: {{{}}}}}}}"
    saved = "schedule: {class_path: Linear}, low: 0.1, high: null, unit: factor"
    assert read_and_compare(text.format(saved)).schedule == Clamp(Linear(), low=0.1)
    absolute = text.format("schedule: {class_path: Linear}, low: 1.0e-5, unit: lr")
    with pytest.raises(ValueError, match=r"LearningRateScheduler\(schedule, min_lr=1e-05\)"):
        instantiate(parser(), parser().parse_string(absolute))
