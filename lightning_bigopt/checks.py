"""Checks of arguments, with one wording for each kind of error.

Every message reads ``name must be <constraint>, got <value>; <advice>``. Without a hint of the
caller the advice is a value that is allowed.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal, get_args

__all__ = [
    "as_code",
    "check_between",
    "check_choice",
    "check_count",
    "check_non_negative",
    "check_number",
    "check_positive",
    "shown",
    "with_article",
    "without_addresses",
]

_LONGEST_REPR = 120  # characters
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
        constraint = f"{'a' if of else 'an'} {noun} of at most 2**53"
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


def shown(value: object) -> str:
    """Returns a short description of a value for a message: its repr, or its class.

    Example:
        >>> shown("5%"), shown(list(range(100))), shown(int)
        ("'5%'", 'a list', 'the class int')
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if type(value).__module__.startswith("omegaconf."):  # its repr is that of a dict or list
        return with_article(type(value).__name__)
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  # any error of the object, a list that is too deep
        text = ""
    is_short = 0 < len(text) <= _LONGEST_REPR and "\n" not in text and " at 0x" not in text
    return text if is_short else with_article(type(value).__name__)


def as_code(value: object) -> str:
    """Returns the ``repr`` of a specification without the addresses of objects in it.

    An address differs in every process. Without them, a rule of a user without a ``repr`` of its
    own does not count as changed in every resumed run.

    Example:
        >>> as_code([len, object()])
        '[<built-in function len>, <object object>]'
    """
    return str(without_addresses(repr(value)))


def without_addresses(value: Any) -> Any:
    """Removes the addresses of objects from a text; returns other values unchanged."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", value) if isinstance(value, str) else value


def with_article(name: str) -> str:
    """Returns a noun with its indefinite article.

    Example:
        >>> with_article("int"), with_article("SGD"), with_article("dict")
        ('an int', 'an SGD', 'a dict')
    """
    begins_with_vowel = name[0].lower() in "aeiou" or (name[:2].isupper() and name[0] in "FHLMNRSX")
    return f"{'an' if begins_with_vowel else 'a'} {name}"


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


def _is_number(value: Any) -> bool:
    is_numpy = isinstance(value, Real) and hasattr(value, "dtype")
    if not (isinstance(value, (int, float)) or is_numpy) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:  # an int beyond the range of floats
        return False
    return True
