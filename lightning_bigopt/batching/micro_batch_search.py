"""A search for the largest micro-batch that fits into memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_bigopt.checks import check_between, check_choice, check_count
from lightning_bigopt.type_checks import check_callable

__all__ = ["MicroBatchSearch", "search_micro_batch_size"]


@dataclass(frozen=True, kw_only=True)
class MicroBatchSearch:
    """The result of a search.

    Args:
        micro_batch_size: Size to use in samples, less the headroom; a trial of it succeeded.
        largest: Largest size in samples whose trial succeeded.
        trials: Size and success of every trial, in order.

    Example:
        >>> search_micro_batch_size(lambda size: size <= 40, maximum=64, headroom=0.0)
        MicroBatchSearch(micro_batch_size=40, largest=40, trials=((1, True), (2, True), (4, True), \
(8, True), (16, True), (32, True), (64, False), (48, False), (40, True), (44, False), (42, False), \
(41, False)))
    """

    micro_batch_size: int
    largest: int
    trials: tuple[tuple[int, bool], ...]


def search_micro_batch_size(
    try_size: Callable[[int], bool],
    *,
    maximum: int,
    minimum: int = 1,
    search: Literal["binary", "power"] = "binary",
    divides: int | None = None,
    headroom: float = 0.1,
) -> MicroBatchSearch:
    """Finds the largest micro-batch that fits: doubles the size, then bisects.

    The order of the trials depends only on their results: processes that agree on every result
    (success on all of them) try the same sizes in the same order. Only sizes whose trial succeeded
    are returned.

    Args:
        try_size: Runs a micro-batch of a size in samples; returns False if memory ran out.
        maximum: Largest size to try, such as global batch / processes.
        minimum: Smallest size to try, such as 2 for a model with batch normalization.
        search: ``"binary"`` finds the exact limit, ``"power"`` tries powers of two only.
        divides: Try only divisors of this number (global batch / processes), so that the
            micro-batches of an update are equal; None for any size.
        headroom: Fraction of the largest size to leave free, in [0, 1), because later batches may
            need more memory. The result is never below the smallest size tried.

    Returns:
        The sizes found, and all trials.

    Raises:
        ValueError: If an argument is out of range, or the smallest size does not fit.

    Example:
        >>> found = search_micro_batch_size(lambda size: size <= 40, maximum=96, divides=96)
        >>> found.micro_batch_size, found.largest
        (24, 32)
    """
    check_callable("try_size", try_size, hint="pass a function of the size that returns a bool")
    check_count("maximum", maximum, of="samples")
    check_between("headroom", headroom, 0, 1, ends="[)", hint="write 0.1")
    check_count("minimum", minimum, of="samples")
    sizes = [size for size in _candidates(maximum, search, divides) if size >= minimum]
    if not sizes:
        raise ValueError(
            f"minimum must leave a size to try up to maximum = {maximum}, got {minimum}; write a "
            "smaller minimum"
        )
    trials: dict[int, bool] = {}

    def fits(size: int) -> bool:
        if size not in trials:
            trials[size] = bool(try_size(size))
        return trials[size]

    if not fits(sizes[0]):
        raise ValueError(
            f"the model must fit into memory with micro_batch_size={sizes[0]}, got out of memory; "
            "shorten the samples, checkpoint activations, or shard the model"
        )
    low, high = 0, len(sizes)
    while low + 1 < high:
        # Until the first failure the size at most doubles, so that no trial is far above the limit.
        doubled = bisect_right(sizes, 2 * sizes[low]) - 1
        middle = max(low + 1, doubled) if high == len(sizes) else (low + high) // 2
        if fits(sizes[middle]):
            low = middle
        else:
            high = middle
    # A size below the largest one may not have been tried, and memory need not grow monotonically.
    kept = max(0, bisect_right(sizes, (1 - headroom) * sizes[low]) - 1)
    while kept and not fits(sizes[kept]):
        kept -= 1
    return MicroBatchSearch(
        micro_batch_size=sizes[kept], largest=sizes[low], trials=tuple(trials.items())
    )


def _candidates(
    maximum: int, search: Literal["binary", "power"], divides: int | None
) -> Sequence[int]:
    check_choice("search", search, ("binary", "power"))
    sizes: Sequence[int] = range(1, maximum + 1)
    if search == "power":
        sizes = [1 << n for n in range(maximum.bit_length())]
    if divides is not None:
        check_count("divides", divides, of="samples")
        sizes = [size for size in sizes if divides % size == 0]
    return sizes
