"""The text of a function with the values that it holds, so that a change can be noticed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from lightning_bigopt.checks import as_code

__all__ = ["as_text"]


def as_text(make: Callable[..., Any]) -> str:
    """Returns the source text of a function or class, and the values that it holds.

    These are the defaults, the variables of the functions around it, and the arguments of a partial
    function. Functions and classes among them count in the same way, other objects by their
    ``repr`` without addresses. Global variables, and what the function calls by a global name, do
    not count.

    Args:
        make: The function.

    Example:
        >>> as_text(partial(max, 1, key=len))
        "{'func': <built-in function max>, 'args': [1], 'key': <built-in function len>}"
    """
    return _text(make, ())


def _text(value: Any, outer: tuple[int, ...]) -> str:  # noqa: PLR0911
    """Returns a value as text; ``outer`` has the functions that hold it, which may hold itself."""
    if id(value) in outer:
        return "itself"
    outer = (*outer, id(value))
    if isinstance(value, partial):
        return _held({"func": value.func, "args": list(value.args), **value.keywords}, outer)
    if isinstance(value, MethodType):
        return _held({"self": value.__self__, "func": value.__func__}, outer)
    if isinstance(value, FunctionType):
        parts = [_source(value), _held({"defaults": list(value.__defaults__ or ())}, outer)]
        return "\n".join(
            [*parts, _held(value.__kwdefaults__ or {}, outer), _variables(value, outer)]
        )
    if isinstance(value, dict):
        return _held(value, outer)
    if type(value) in (list, tuple):
        return f"[{', '.join(_text(item, outer) for item in value)}]"
    if isinstance(value, (set, frozenset)):  # its order differs between processes
        return f"{{{', '.join(sorted(_text(item, outer) for item in value))}}}"
    return _source(value) if isinstance(value, type) else as_code(value)


def _held(values: Mapping[Any, Any], outer: tuple[int, ...]) -> str:
    return "{" + ", ".join(f"{name!r}: {_text(v, outer)}" for name, v in values.items()) + "}"


def _variables(function: FunctionType, outer: tuple[int, ...]) -> str:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    values = {}
    for name, cell in cells:
        try:
            values[name] = cell.cell_contents
        except ValueError:  # noqa: PERF203 (a variable without a value)
            values[name] = None
    return _held(values, outer)


def _source(value: Any) -> str:
    """Returns the source text of a function or class; its name if there is none."""
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):  # defined in a console, or a builtin
        return as_code(value)
