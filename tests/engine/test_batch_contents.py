"""Counts and weights of batches by the name of a field."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_bigopt
from lightning_bigopt import (
    BatchSizeScheduler,
    ConstantBatchSize,
    HyperparameterScheduler,
    LearningRateScheduler,
    Linear,
    MeasuredBatchSize,
    OptimizationMonitor,
)
from lightning_bigopt.engine.batch_contents import count, named_function, weigh
from lightning_bigopt.engine.capability import Capability

BATCH: dict[str, Any] = {
    "ids": torch.zeros(4, 7),
    "mask": torch.tensor([[1, 1, 0], [1, 0, 0]]),
    "text": ["one", "two"],
}


@pytest.mark.parametrize(("field", "expected"), [("ids", 28), ("mask", 3)])
def test_field_is_counted_by_entries_and_a_mask_by_its_sum(field: str, expected: int) -> None:
    assert count(BATCH, field, name="tokens") == expected
    assert float(weigh(BATCH, field, name="loss_weight")) == expected


@pytest.mark.parametrize("name", ["tokens", "loss_weight"])
def test_field_that_is_no_tensor_raises(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must name a field .* tensor, got 'text'.* list"):
        weigh(BATCH, "text", name=name)


def test_missing_field_raises() -> None:
    with pytest.raises(ValueError, match=r"tokens must be a function .* got 'label'"):
        count(BATCH, "label", name="tokens")


# ------------------------------------------------------------------------------- dotted names


# Every argument that takes the dotted name of a function.
def partial_measured(**options: Any) -> MeasuredBatchSize:
    return MeasuredBatchSize(4, high=8, **options)


partial_measured.__name__ = "MeasuredBatchSize"
ARGUMENTS: dict[str, Callable[[Any], Any]] = {
    f"{make.__name__}({name}=)": lambda value, make=make, name=name, more=more: make(
        *more, **{name: value}
    )
    for make, more, names in (
        (LearningRateScheduler, [Linear()], ("samples", "tokens")),
        (HyperparameterScheduler, ["weight_decay", Linear()], ("samples", "tokens")),
        (BatchSizeScheduler, [ConstantBatchSize(4)], ("samples", "tokens", "weight")),
        (partial_measured, [], ("samples", "tokens", "weight")),
        (OptimizationMonitor, [], ("samples", "tokens")),
    )
    for name in names
}
text = "the name of a field"


@pytest.fixture(autouse=True)
def broken_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes modules that cannot be imported."""
    (tmp_path / "divides_by_zero.py").write_text("1 / 0")
    (tmp_path / "has_a_syntax_error.py").write_text("def f(:")
    monkeypatch.syspath_prepend(tmp_path)


def test_every_argument_is_listed() -> None:
    # The mixins pass their arguments on to these callbacks.
    found = {
        f"{name}({argument}=)"
        for name, public in vars(lightning_bigopt).items()
        if inspect.isclass(public) and issubclass(public, Capability)
        for argument in inspect.signature(public).parameters
        if argument in ("samples", "tokens", "weight")
    }
    assert found == set(ARGUMENTS)


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("math.pi", r"must name a function, got 'math.pi', which is a float; "),
        ("collections.abc", r"must name a function, .*, which is a module; "),
        ("torch.nn.Linear", r"must name a function, got 'torch.nn.Linear', which is a class; "),
        (f"{__name__}.text", r"must name a function, .*text', which is a str; "),
        ("no.such.function", r"got 'no.such.function' \(ModuleNotFoundError: No module "),
        ("math.nothing", r"got 'math.nothing' \(AttributeError: "),
        ("math..prod", r"got 'math..prod', which is none of these; "),
        (".prod", r"got '.prod', which is none of these; "),
        ("os.path:join", r"got 'os.path:join', which is none of these; "),
        ("os.system('true')", r"got \"os.system\('true'\)\", which is none of these; "),
        ("divides_by_zero.f", r"got 'divides_by_zero.f' \(ZeroDivisionError: "),
        ("has_a_syntax_error.f", r"got 'has_a_syntax_error.f' \(SyntaxError: "),
        (5, r"must be a function of the batch, its dotted name, or .*, got 5; "),
        (b"math.prod", r"must be a function of the batch, .*, got b'math.prod'; "),
        (dict, r"must be a function of the batch, .*, got the class dict; "),
    ],
)
def test_what_is_no_function_raises(argument: str, value: Any, message: str) -> None:
    name = argument.split("(")[1][:-2]
    with pytest.raises(ValueError, match=f"^{name} .*{message}.*write "):
        ARGUMENTS[argument](value)


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize(
    "value", ["math.prod", "ids", None, len, partial(len), "torch.Tensor.numel", lambda batch: 1]
)
def test_functions_and_names_of_fields_are_accepted(argument: str, value: Any) -> None:
    ARGUMENTS[argument](value)


def test_dotted_name_is_resolved_to_the_function() -> None:
    assert named_function("math.prod", name="tokens") is math.prod
