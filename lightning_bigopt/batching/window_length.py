"""An int for ``accumulate_grad_batches`` whose accumulation window may start at any batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_bigopt.checks import check_count

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["WindowLength"]


class WindowLength(int):
    """An accumulation window of ``length`` micro-batches that starts at batch ``start``.

    Lightning evaluates ``batch_idx % accumulate_grad_batches`` and
    ``loss / accumulate_grad_batches`` on every batch. The modulo of this int counts from the start
    of the window, so that the length may change at any batch. In every other respect, such as
    printing, comparison and division, it is the plain length.

    Args:
        length: Micro-batches in the window; positive.
        start: Index in the epoch of the first batch of the window; non-negative.

    Raises:
        ValueError: If ``length`` is not positive or ``start`` is negative.

    Example:
        >>> window = WindowLength(3, 10)
        >>> [batch % window for batch in (10, 11, 12)], [(batch + 1) % window for batch in (10, 12)]
        ([0, 1, 2], [1, 0])
        >>> 6.0 / window, window == 3, window
        (2.0, True, WindowLength(3, 10))
    """

    start: int

    def __new__(cls, length: int, start: int) -> Self:
        """Creates the int."""
        length, start = int(length), int(start)
        check_count("length", length)
        check_count("start", start, minimum=0)
        self = super().__new__(cls, length)
        self.start = start
        return self

    def __rmod__(self, batch: int) -> int:
        """Returns ``(batch - start) % length``."""
        return (batch - self.start) % int(self)

    def __repr__(self) -> str:
        return f"WindowLength({int(self)}, {self.start})"

    def __str__(self) -> str:
        return str(int(self))

    def __reduce__(self) -> tuple[type[WindowLength], tuple[int, int]]:
        # int's own reduction calls __new__ without the start. Copies of a Trainer hold this number.
        return WindowLength, (int(self), self.start)
