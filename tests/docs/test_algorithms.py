"""The page of algorithms has the defaults of the code, and every algorithm."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import lightning_bigopt
from lightning_bigopt import BatchSizePolicy, ClippingRule, Compressor, Detector, Schedule
from lightning_bigopt.gradients import Action

PAGE = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
CALLS = [call for call in re.findall(r"`([A-Z]\w+\([^`]*=[^`]*\))`", PAGE) if "10_000" not in call]
BASES = (BatchSizePolicy, ClippingRule, Compressor, Detector, Schedule, Action)


def arguments_on_the_page(call: str) -> tuple[str, dict[str, object]]:
    """Returns a class's name and its keyword arguments as arguments_on_the_page on the page."""
    node = ast.parse(call, mode="eval").body
    assert isinstance(node, ast.Call)
    assert isinstance(node.func, ast.Name)
    assert not node.args
    return node.func.id, {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}


@pytest.mark.parametrize("call", CALLS)
def test_defaults_on_the_page_are_those_of_the_code(call):
    name, arguments = arguments_on_the_page(call)
    parameters = inspect.signature(getattr(lightning_bigopt, name)).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    if name == "StepGuard":  # the page names only some arguments
        defaults = {key: defaults[key] for key in arguments}
    assert arguments == defaults


def test_page_has_defaults_to_check():
    assert len(CALLS) > 30


def test_every_algorithm_is_on_the_page():
    public = (getattr(lightning_bigopt, name) for name in lightning_bigopt.__all__)
    algorithms = {c.__name__ for c in public if inspect.isclass(c) and issubclass(c, BASES)}
    algorithms -= {base.__name__ for base in BASES}
    missing = {name for name in algorithms if not re.search(rf"\b{name}\b", PAGE)}
    assert len(algorithms) > 40
    assert not missing
