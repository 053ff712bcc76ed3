"""Checks of arguments, with one wording for each kind of error.

Every message reads ``name must be <constraint>, got <value>; <advice>``. Without a hint of the
caller the advice is a value that is allowed.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal, get_args

from lightning_bigopt.descriptions import shown, with_article

__all__ = [
    "check_between",
    "check_callable",
    "check_choice",
    "check_count",
    "check_instance",
    "check_items",
    "check_non_negative",
    "check_number",
    "check_positive",
    "check_positive_or_none",
    "checked_tuple",
    "shown",
]

_LARGEST_COUNT = 2**53  # the largest int up to which every int is a float


def check_choice(name: str, value: object, choices: Any, *, hint: str = "") -> None:
    """Raises unless a value is one of several.

    Args:
        name: Name of the argument.
        value: Value of the argument.
        choices: A ``Literal`` type, or a sequence of values; None among them is written ``None``.
        hint: Advice at the end of the message, without the semicolon.

    Raises:
        ValueError: If ``value`` is not one of ``choices``.

    Example:
        >>> check_choice("mode", "max", ("min", "max"))
        >>> check_choice("mode", "least", ("min", "max"))
        Traceback (most recent call last):
        ValueError: mode must be 'min' or 'max', got 'least'; write mode='min'
    """
    allowed: Sequence[object] = get_args(choices) or choices
    # Not ``value in allowed``: an array or a tensor compares element by element.
    if any(type(value) is type(choice) and value == choice for choice in allowed):
        return
    *first, last = map(repr, allowed)
    listed = f"{', '.join(first)} or {last}" if first else last
    if not hint:
        words = [choice for choice in allowed if isinstance(choice, str)]
        similar = difflib.get_close_matches(value, words, n=1) if isinstance(value, str) else []
        hint = f"did you mean {similar[0]!r}?" if similar else f"write {name}={allowed[0]!r}"
    raise ValueError(f"{name} must be {listed}, got {shown(value)}; {hint}")


def check_count(
    name: str, value: object, *, minimum: int = 1, of: str = "", hint: str = ""
) -> None:
    """Raises unless a value is an integer of at least ``minimum``.

    Args:
        name: Name of the argument.
        value: Value of the argument.
        minimum: The smallest integer allowed.
        of: Unit of the count, such as ``"samples"``.
        hint: Advice at the end of the message, without the semicolon.

    Raises:
        ValueError: If ``value`` is not such an integer; a bool is not.

    Example:
        >>> check_count("size", 32)
        >>> check_count("size", 0, of="samples", hint="write an int such as 256")
        Traceback (most recent call last):
        ValueError: size must be a positive number of samples, got 0; write an int such as 256
    """
    if type(value) is int and minimum <= value <= _LARGEST_COUNT:
        return
    noun = f"number of {of}" if of else "integer"
    if type(value) is int and value > _LARGEST_COUNT:
        constraint, hint = f"a {noun} of at most 2**53", ""
    elif minimum in (0, 1):
        constraint = f"a {'positive' if minimum else 'non-negative'} {noun}"
    else:
        constraint = f"{'a' if of else 'an'} {noun} of at least {minimum}"
    hint = _without_quotes(value) or hint or f"write an integer such as {minimum}"
    raise ValueError(f"{name} must be {constraint}, got {shown(value)}; {hint}")


def check_positive(name: str, value: Any, *, hint: str = "") -> None:
    """Raises unless a value is a positive and finite number.

    Args:
        name: Name of the argument.
        value: Value of the argument.
        hint: Advice at the end of the message, without the semicolon.

    Raises:
        ValueError: If ``value`` is not such a number; a bool is not.

    Example:
        >>> check_positive("max_norm", 0.0, hint="remove the rule to disable clipping")
        Traceback (most recent call last):
        ValueError: max_norm must be positive and finite, got 0.0; remove the rule to \
disable clipping
    """
    if not (_is_number(value) and 0 < value < math.inf):
        raise _number_error(name, "positive and finite", value, hint or "write 1.0")


def check_positive_or_none(hint: str, **values: Any) -> None:
    """Raises unless each value is a positive and finite number, or None.

    Args:
        hint: Advice at the end of the message, without the semicolon: what None stands for.
        values: Names and values of the arguments.

    Raises:
        ValueError: If a value is neither; a bool is not.

    Example:
        >>> check_positive_or_none("None if unknown", epochs=None, samples=-1)
        Traceback (most recent call last):
        ValueError: samples must be positive and finite, got -1; None if unknown
    """
    for name, value in values.items():
        if value is not None:
            check_positive(name, value, hint=hint)


def check_non_negative(name: str, value: Any, *, hint: str = "") -> None:
    """Raises unless a value is a finite number, zero or more.

    Args:
        name: Name of the argument.
        value: Value of the argument.
        hint: Advice at the end of the message, without the semicolon.

    Raises:
        ValueError: If ``value`` is not such a number; a bool is not.

    Example:
        >>> check_non_negative("end", -0.1)
        Traceback (most recent call last):
        ValueError: end must be non-negative and finite, got -0.1; write 0.0
    """
    if not (_is_number(value) and 0 <= value < math.inf):
        raise _number_error(name, "non-negative and finite", value, hint or "write 0.0")


def check_between(
    name: str,
    value: Any,
    low: float,
    high: float,
    *,
    ends: Literal["()", "[)", "(]", "[]"] = "()",
    hint: str = "",
) -> None:
    """Raises unless a number is in an interval.

    Args:
        name: Name of the argument.
        value: Value of the argument.
        low: Lower end.
        high: Upper end.
        ends: Which ends belong to the interval: a square bracket includes its end.
        hint: Advice at the end of the message, without the semicolon.

    Raises:
        ValueError: If ``value`` is not such a number; a bool is not.

    Example:
        >>> check_between("factor", 0.5, 0, 1)
        >>> check_between("headroom", 1, 0, 1, ends="[)", hint="write 0.1")
        Traceback (most recent call last):
        ValueError: headroom must be in [0, 1), got 1; write 0.1
    """
    above = _is_number(value) and (value >= low if ends[0] == "[" else value > low)
    if not (above and (value <= high if ends[1] == "]" else value < high)):
        interval = f"{ends[0]}{low:g}, {high:g}{ends[1]}"
        example = (low + high) / 2 if math.isfinite(low + high) else low + 1
        raise _number_error(name, f"in {interval}", value, hint or f"write {example:g}")


def check_number(name: str, value: Any, *, hint: str = "write 1.0") -> None:
    """Raises unless a value is a finite number.

    Args:
        name: Name of the argument.
        value: Value of the argument.
        hint: Advice at the end of the message, without the semicolon.

    Raises:
        ValueError: If ``value`` is not such a number; a bool is not.

    Example:
        >>> check_number("variance", float("nan"))
        Traceback (most recent call last):
        ValueError: variance must be finite, got nan; write 1.0
    """
    if not (_is_number(value) and math.isfinite(value)):
        raise _number_error(name, "finite", value, hint)


def check_callable(name: str, value: object, *, hint: str = "pass a function") -> None:
    """Raises unless a value can be called.

    Args:
        name: Name of the argument.
        value: Value of the argument.
        hint: Advice at the end of the message, without the semicolon.

    Raises:
        ValueError: If ``value`` cannot be called.

    Example:
        >>> check_callable("collate_fn", 3)
        Traceback (most recent call last):
        ValueError: collate_fn must be a function, got 3; pass a function
    """
    if not callable(value):
        raise ValueError(f"{name} must be a function, got {shown(value)}; {hint}")


def check_instance(name: str, value: object, kind: type, *, hint: str = "") -> None:
    """Raises unless a value is an instance of a class.

    Args:
        name: Name of the argument.
        value: Value of the argument.
        kind: The class.
        hint: Advice at the end of the message, without the semicolon.

    Raises:
        ValueError: If ``value`` is of another class.

    Example:
        >>> check_instance("size", "32", int, hint="write 32")
        Traceback (most recent call last):
        ValueError: size must be an int, got '32'; write 32
    """
    if not isinstance(value, kind):
        expected = with_article(kind.__name__)
        if isinstance(value, type) and issubclass(value, kind):
            hint = f"write {value.__name__}(...)"
        hint = hint or f"write {name}={kind.__name__}(...)"
        raise ValueError(f"{name} must be {expected}, got {shown(value)}; {hint}")


def checked_tuple(name: str, values: Any, kind: type, *, hint: str = "") -> tuple[Any, ...]:
    """Returns a sequence as a tuple; raises unless all its elements are instances of a class.

    Args:
        name: Name of the argument.
        values: Value of the argument.
        kind: The class of the elements.
        hint: Advice at the end of the message, without the semicolon.

    Raises:
        ValueError: If ``values`` is no sequence, is empty, or has another element.

    Example:
        >>> checked_tuple("sizes", [1, 2], int)
        (1, 2)
        >>> checked_tuple("sizes", 2, int)
        Traceback (most recent call last):
        ValueError: sizes must be a list of int objects, got 2; write [2]
    """
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        if isinstance(values, kind):
            hint = f"write [{shown(values)}]"
        raise ValueError(
            f"{name} must be a list of {kind.__name__} objects, got {shown(values)}; "
            f"{hint or f'write {name}=[{kind.__name__}(...)]'}"
        )
    for index, value in enumerate(values):
        check_instance(f"{name}[{index}]", value, kind, hint=hint)
    return tuple(values)


def check_items(name: str, values: Any, kind: type) -> None:
    """Raises unless a value is a tuple, perhaps an empty one, of instances of a class.

    Args:
        name: Name of the argument.
        values: Value of the argument.
        kind: The class of the elements.

    Raises:
        ValueError: If ``values`` is no tuple, or has another element.

    Example:
        >>> check_items("sizes", (1, "2"), int)
        Traceback (most recent call last):
        ValueError: sizes[1] must be an int, got '2'; write sizes[1]=int(...)
    """
    check_instance(name, values, tuple, hint=f"write {name}=({kind.__name__}(...),)")
    for index, value in enumerate(values):
        check_instance(f"{name}[{index}]", value, kind)


def _number_error(name: str, constraint: str, value: object, hint: str) -> ValueError:
    if isinstance(value, str):
        constraint, hint = f"a number {constraint}", _without_quotes(value) or hint
        if not constraint.startswith("a number in"):
            constraint = f"a {constraint.removeprefix('a number ')} number"
    return ValueError(f"{name} must be {constraint}, got {shown(value)}; {hint}")


def _without_quotes(value: object) -> str:
    """Returns advice for a number that was passed as a string; empty for any other value."""
    try:
        is_quoted = isinstance(value, str) and len(value) < 30 and math.isfinite(float(value))
    except ValueError:
        return ""
    return f"write {str(value).strip()} without quotes" if is_quoted else ""


def _is_number(value: object) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):  # Real: NumPy scalars too
        return False
    try:
        float(value)
    except OverflowError:  # an int beyond the range of floats
        return False
    return True
