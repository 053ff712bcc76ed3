"""Every public name has a docstring with an example; doctest runs the examples."""

from __future__ import annotations

import doctest
import inspect

import pytest

import lightning_bigopt
from lightning_bigopt import schedules

PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (lightning_bigopt, schedules)
    for name in module.__all__
}


def own_docstring(value: object) -> str:
    """Returns the docstring of the object itself; for a class not that of a parent."""
    return inspect.cleandoc(vars(value).get("__doc__") or getattr(value, "__doc__", None) or "")


@pytest.mark.parametrize("name", sorted(n for n, v in PUBLIC.items() if callable(v)))
def test_public_name_has_a_docstring_with_an_example(name: str):
    value = PUBLIC[name]
    text = own_docstring(value)
    assert text.split("\n\n")[0].rstrip().endswith((".", "::")), "the summary must be a sentence"
    assert doctest.DocTestParser().get_examples(text), "there must be an example (>>>)"
    inherited = [inspect.getdoc(parent) for parent in getattr(value, "__mro__", ())[1:]]
    assert inspect.getdoc(value) not in inherited, "the docstring must be its own"


@pytest.mark.parametrize("name", sorted(n for n, v in PUBLIC.items() if inspect.isclass(v)))
def test_public_methods_have_docstrings(name: str):
    value = PUBLIC[name]
    for method, member in vars(value).items():
        if inspect.isfunction(member) and not method.startswith("_"):
            assert inspect.getdoc(member), f"{name}.{method} must have a docstring"


def test_there_are_public_names():
    assert len(PUBLIC) > 20
