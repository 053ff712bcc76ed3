"""Parses schedules and ranges written as Python expressions, without evaluating other code."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from typing import Any

from lightning_bigopt import schedules
from lightning_bigopt.checks import shown
from lightning_bigopt.schedules.base import Schedule
from lightning_bigopt.tuning.space import Choice, Integer, Log, Range, Uniform

__all__ = ["parse_range", "parse_schedule", "schedule_names"]


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
    language = _Language(
        argument="schedule",
        kinds={name: getattr(schedules, name) for name in schedule_names()},
        parts="schedules and literals",
        listed="one of those that bigopt schedules lists",
        example="Cosine(end=0.1)",
    )
    value = language.parse(text)
    if not isinstance(value, Schedule):
        raise ValueError(f"{language.must_be(text)}; for instance Cosine(end=0.1)")
    return value


def parse_range(text: str) -> Range:
    """Parses an expression into a range of a search space.

    Args:
        text: The expression, such as ``Log(1e-4, 1e-1)`` or ``Choice(["10%", "20%"])``.

    Returns:
        The range.

    Raises:
        ValueError: If the expression is not a range, or an argument is wrong.

    Example:
        >>> parse_range("Log(1e-4, 1e-1)")
        Log(low=0.0001, high=0.1)
        >>> parse_range("log(1e-4, 1e-1)")
        Traceback (most recent call last):
        ValueError: space must be made of ranges and literals, got 'log(0.0001, 0.1)'; for instance
        Log(1e-4, 1e-1)
    """
    language = _Language(
        argument="space",
        kinds={kind.__name__: kind for kind in (Choice, Integer, Log, Uniform)},
        parts="ranges and literals",
        listed="Log, Uniform, Integer or Choice",
        example="Log(1e-4, 1e-1)",
    )
    value = language.parse(text)
    if not isinstance(value, Range):
        raise ValueError(f"{language.must_be(text)}; for instance Log(1e-4, 1e-1)")
    return value


@dataclass(frozen=True, kw_only=True)
class _Language:
    """Expressions of some classes and literals.

    Args:
        argument: What an expression is, for error messages.
        kinds: The classes by name.
        parts: What an expression consists of.
        listed: Where the classes are listed.
        example: An expression.
    """

    argument: str
    kinds: Mapping[str, type[Any]]
    parts: str
    listed: str
    example: str

    def parse(self, text: str) -> Any:
        """Returns the value of an expression; of a name without parentheses with its defaults."""
        try:
            node = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            raise ValueError(f"{self.must_be(text)}; {error.msg}") from error
        return self._constructed(self._evaluate(node))

    def must_be(self, text: str) -> str:
        """Returns the beginning of an error message."""
        return f"{self.argument} must be made of {self.parts}, got {shown(text)}"

    def _evaluate(self, node: ast.expr) -> Any:
        match node:
            case ast.Name(id=name):
                if name in self.kinds:
                    return self.kinds[name]
                similar = get_close_matches(name, self.kinds, n=1)
                first = self.example.partition("(")[0]
                advice = f"did you mean {similar[0]}?" if similar else f"for instance {first}"
                raise ValueError(
                    f"{self.argument} must be {self.listed}, got {shown(name)}; {advice}"
                )
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if (
                name in self.kinds and all(keyword.arg for keyword in keywords)
            ):
                named = {str(keyword.arg): self._argument(keyword.value) for keyword in keywords}
                return _construct(self.kinds[name], tuple(map(self._argument, args)), named)
            case ast.List(elts=items):
                return [self._argument(item) for item in items]
            case ast.Tuple(elts=items):
                return tuple(self._argument(item) for item in items)
        try:
            return ast.literal_eval(node)
        except ValueError as error:
            text = ast.unparse(node)
            raise ValueError(f"{self.must_be(text)}; for instance {self.example}") from error

    def _argument(self, node: ast.expr) -> Any:
        return self._constructed(self._evaluate(node))

    @staticmethod
    def _constructed(value: Any) -> Any:
        return _construct(value, (), {}) if isinstance(value, type) else value


def _construct(kind: type[Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    try:
        return kind(*args, **named)
    except TypeError as error:
        names = ", ".join(
            field.name
            if field.default is MISSING and field.default_factory is MISSING
            else f"{field.name}={field.default!r}"
            for field in fields(kind)
            if field.init
        )
        raise ValueError(
            f"{kind.__name__} must be written as {kind.__name__}({names}), "
            f"got other arguments: {error}"
        ) from error
