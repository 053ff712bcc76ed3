"""Errors that end a trial: pruned, refused for its values, or a mistake of the setup."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["PrunedError", "RefusedError", "SetupError", "refusals_pruned"]


class PrunedError(Exception):
    """Ends a trial as a pruned one; its message is the reason."""


class RefusedError(PrunedError):
    """Ends a trial whose values were refused before its first update."""


class SetupError(ValueError):
    """A mistake that no value of a trial has caused; it ends the study."""


@contextmanager
def refusals_pruned() -> Iterator[None]:
    """Raises a RefusedError if a constructor in the block refuses a value."""
    try:
        yield
    except SetupError:
        raise
    except ValueError as error:
        raise RefusedError(f"refused: {error}") from error
