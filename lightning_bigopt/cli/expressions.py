"""Parses schedules written as Python expressions, without evaluating any other code."""

from __future__ import annotations

import ast
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import Any

from lightning_bigopt import schedules
from lightning_bigopt.checks import shown
from lightning_bigopt.schedules.base import Schedule

__all__ = ["parse_schedule", "schedule_names"]


def schedule_names() -> list[str]:
    """Returns the names of all schedules, in alphabetical order."""
    return sorted((name for name in schedules.__all__ if name != "Schedule"), key=str.lower)


def parse_schedule(text: str) -> Schedule:
    """Parses an expression into a schedule.

    The expression may contain names of schedules, their arguments and literals. No other code is
    evaluated.

    Args:
        text: The expression, such as ``Cosine`` or ``Warmup("5%", Cosine(end=0.1))``.

    Returns:
        The schedule.

    Raises:
        ValueError: If the expression is not a schedule, or an argument is wrong.

    Example:
        >>> parse_schedule("Cosine")
        Cosine(start=1.0, end=0.0)
        >>> parse_schedule("Warmup('5%', Cosine(end=0.1))").schedule
        Cosine(start=1.0, end=0.1)
        >>> parse_schedule("__import__('os')")
        Traceback (most recent call last):
        ValueError: schedule must be made of schedules and literals, got "__import__('os')"; ...
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{_must_be(text)}; {error.msg}") from error
    value = _evaluate(node)
    if isinstance(value, type):  # a name without parentheses
        value = _construct(value, (), {})
    if not isinstance(value, Schedule):
        raise ValueError(f"{_must_be(text)}; for instance Cosine(end=0.1)")
    return value


def _must_be(text: str) -> str:
    return f"schedule must be made of schedules and literals, got {shown(text)}"


def _evaluate(node: ast.expr) -> Any:
    match node:
        case ast.Name(id=name):
            if name in schedule_names():
                return getattr(schedules, name)
            similar = get_close_matches(name, schedule_names(), n=1)
            advice = f"did you mean {similar[0]}?" if similar else "for instance Cosine"
            raise ValueError(
                f"schedule must be one of those that bigopt schedules lists, got {shown(name)}; "
                f"{advice}"
            )
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if (
            name in schedule_names() and all(keyword.arg for keyword in keywords)
        ):
            named = {str(keyword.arg): _argument(keyword.value) for keyword in keywords}
            return _construct(getattr(schedules, name), tuple(map(_argument, args)), named)
        case ast.List(elts=items):
            return [_argument(item) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_argument(item) for item in items)
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise ValueError(f"{_must_be(ast.unparse(node))}; for instance Cosine(end=0.1)") from error


def _argument(node: ast.expr) -> Any:
    value = _evaluate(node)
    return _construct(value, (), {}) if isinstance(value, type) else value


def _construct(schedule: type[Schedule], args: tuple[Any, ...], named: dict[str, Any]) -> Schedule:
    try:
        return schedule(*args, **named)
    except TypeError as error:
        names = ", ".join(
            field.name
            if field.default is MISSING and field.default_factory is MISSING
            else f"{field.name}={field.default!r}"
            for field in fields(schedule)
            if field.init
        )
        raise ValueError(
            f"{schedule.__name__} must be written as {schedule.__name__}({names}), "
            f"got other arguments: {error}"
        ) from error
