"""The int that lets Lightning accumulate over any window, opened at any batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["WindowLength"]


class WindowLength(int):
    """``length`` micro-batches from batch ``start`` of the epoch on.

    Lightning reads ``batch_idx % accumulate_grad_batches`` and ``loss / accumulate_grad_batches``
    afresh on every batch. An int whose modulo counts from the window's own start is therefore
    right for any change at any batch, and prints, compares and divides as the plain length.

    Args:
        length: Micro-batches in the window; positive.
        start: Index in the epoch of its first batch; non-negative.

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
        """Makes the int."""
        if length < 1:
            raise ValueError(f"length must be positive, got {length!r}")
        if start < 0:
            raise ValueError(f"start must be non-negative, got {start!r}")
        self = super().__new__(cls, length)
        self.start = int(start)
        return self

    def __rmod__(self, batch: int) -> int:
        """``(batch - start) % length``."""
        return (batch - self.start) % int(self)

    def __repr__(self) -> str:
        return f"WindowLength({int(self)}, {self.start})"

    def __str__(self) -> str:
        return str(int(self))

    def __reduce__(self) -> tuple[type[WindowLength], tuple[int, int]]:
        return WindowLength, (int(self), self.start)
