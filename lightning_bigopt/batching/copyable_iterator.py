"""An iterator that copies and pickles as one without items."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["CopyableIterator"]


class CopyableIterator(Iterator[Any]):
    """An iterator whose copies and pickles are at their end.

    A Trainer that is copied during a fit holds the iterator of its loader, and a generator cannot
    be copied. The copy starts a new epoch with a new iterator.

    Args:
        items: The iterator.

    Example:
        >>> import copy
        >>> items = CopyableIterator(number for number in range(3))
        >>> next(items), list(copy.deepcopy(items)), list(items)
        (0, [], [1, 2])
    """

    def __init__(self, items: Iterator[Any]) -> None:
        self._items = items

    def __next__(self) -> Any:
        """Returns the next item."""
        return next(self._items)

    def __reduce__(self) -> tuple[Callable[[Any], Iterator[Any]], tuple[tuple[()]]]:
        return iter, ((),)
