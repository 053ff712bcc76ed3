"""Parameter names and the patterns that users write for them."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import lru_cache

__all__ = ["as_patterns", "check_all_match", "first_match"]


def as_patterns(patterns: str | Iterable[str]) -> tuple[str, ...]:
    """One pattern or several as a tuple."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


@lru_cache(maxsize=64)
def first_match(names: tuple[str, ...], patterns: tuple[str, ...]) -> tuple[int | None, ...]:
    """For each name the index of the first pattern that it matches; None where there is none.

    Example:
        >>> first_match(("head.bias", "body.bias"), ("head.*", "*.bias"))
        (0, 1)
    """
    return tuple(
        next((i for i, pattern in enumerate(patterns) if fnmatchcase(name, pattern)), None)
        for name in names
    )


@lru_cache(maxsize=64)
def check_all_match(names: tuple[str, ...], patterns: tuple[str, ...]) -> None:
    """Raises where a pattern is the first match of no name.

    Raises:
        ValueError: With the pattern, the names, and the pattern that took its names away.
    """
    used = set(first_match(names, patterns))
    for index, pattern in enumerate(patterns):
        if index in used:
            continue
        taken = [name for name in names if fnmatchcase(name, pattern)]
        why = f"; an earlier pattern matches {taken[0]} first" if taken else ""
        some = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        raise ValueError(
            f"every pattern must match a parameter, got {pattern!r}, which matches none of "
            f"{some or 'no parameters at all'}{why}"
        )
