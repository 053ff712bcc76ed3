"""Checks of the types of arguments, in the wording of :mod:`lightning_bigopt.checks`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from lightning_bigopt.checks import shown, with_article
from lightning_bigopt.config_values import CONVERT, is_config

__all__ = ["check_callable", "check_instance", "check_items", "checked_tuple", "path_or_none"]


def check_instance(
    name: str, value: object, kind: type | tuple[type, ...], *, hint: str = ""
) -> None:
    """Raises unless a value is an instance of a class, or of one of several.

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
        kinds = kind if isinstance(kind, tuple) else (kind,)
        # Classes of the two packages of Lightning have the same name.
        names = dict.fromkeys(kind.__name__ for kind in kinds)
        expected = " or ".join(map(with_article, names))
        if isinstance(value, type) and issubclass(value, kind):
            hint = f"write {value.__name__}(...)"
        elif is_config(value):
            hint = CONVERT
        hint = hint or f"write {name}={kinds[0].__name__}(...)"
        raise ValueError(f"{name} must be {expected}, got {shown(value)}; {hint}")


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


def path_or_none(name: str, value: Any, *, hint: str) -> str | None:
    """Returns a path as a string, or None; raises for anything else, also for an empty string.

    Args:
        name: Name of the argument.
        value: Value of the argument.
        hint: Advice at the end of the message, without the semicolon.

    Raises:
        ValueError: If ``value`` is neither a path nor None.

    Example:
        >>> path_or_none("report", True, hint="write 'report.html'")
        Traceback (most recent call last):
        ValueError: report must be a path or None, got True; write 'report.html'
    """
    if value is None:
        return None
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else ""
    if not path or not isinstance(path, str):
        raise ValueError(f"{name} must be a path or None, got {shown(value)}; {hint}")
    return path
