"""The search for the largest micro-batch that fits: only sizes that ran are ever returned."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_bigopt.batching.policies import check_size

__all__ = ["MicroBatchSearch", "search_micro_batch_size"]


@dataclass(frozen=True, kw_only=True)
class MicroBatchSearch:
    """What a search found.

    Args:
        micro_batch_size: The size to use, head-room kept; it ran.
        largest: The largest size that ran.
        trials: Every trial in order: the size, and whether it ran.

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
    """Finds the largest micro-batch that runs, doubling first and then halving the gap.

    The trials depend on the answers alone: processes that agree on every answer (the worst one of
    all) try the same sizes in the same order.

    Args:
        try_size: Runs a micro-batch of a size; False where memory did not suffice.
        maximum: The largest size worth trying, such as global batch / processes.
        minimum: The smallest, such as 2 for a model with batch normalization.
        search: ``"binary"`` closes in on the limit, ``"power"`` stays with powers of two.
        divides: Try only divisors of this number (global batch / processes), so that the
            accumulation comes out even; None for any size.
        headroom: Share of the largest size to leave free, in [0, 1), because later batches may
            need more memory. Below the smallest size there is none to leave.

    Returns:
        What was found.

    Raises:
        ValueError: If an argument is out of range, or not even the smallest size ran.

    Example:
        >>> found = search_micro_batch_size(lambda size: size <= 40, maximum=96, divides=96)
        >>> found.micro_batch_size, found.largest
        (24, 32)
    """
    check_size("maximum", maximum)
    if not 0 <= headroom < 1:
        raise ValueError(f"headroom must be in [0, 1), got {headroom!r}; write 0.1")
    check_size("minimum", minimum)
    sizes = [size for size in _candidates(maximum, search, divides) if size >= minimum]
    if not sizes:
        raise ValueError(
            f"minimum must leave a size up to maximum = {maximum} that fits, got {minimum}"
        )
    trials: dict[int, bool] = {}

    def runs(size: int) -> bool:
        if size not in trials:
            trials[size] = bool(try_size(size))
        return trials[size]

    if not runs(sizes[0]):
        raise ValueError(
            f"the model must fit into memory with micro_batch_size={sizes[0]}, got out of memory; "
            "shorten the samples, checkpoint activations, or shard the model"
        )
    low, high = 0, len(sizes)
    while low + 1 < high:
        # Until something has failed, the largest size up to twice the last one that ran.
        doubled = bisect_right(sizes, 2 * sizes[low]) - 1
        middle = max(low + 1, doubled) if high == len(sizes) else (low + high) // 2
        if runs(sizes[middle]):
            low = middle
        else:
            high = middle
    kept = max(0, bisect_right(sizes, (1 - headroom) * sizes[low]) - 1)
    while kept and not runs(sizes[kept]):
        kept -= 1
    return MicroBatchSearch(
        micro_batch_size=sizes[kept], largest=sizes[low], trials=tuple(trials.items())
    )


def _candidates(
    maximum: int, search: Literal["binary", "power"], divides: int | None
) -> Sequence[int]:
    if search not in ("binary", "power"):
        raise ValueError(f"search must be 'binary' or 'power', got {search!r}")
    sizes: Sequence[int] = range(1, maximum + 1)
    if search == "power":
        sizes = [1 << n for n in range(maximum.bit_length())]
    if divides is not None:
        check_size("divides", divides)
        sizes = [size for size in sizes if divides % size == 0]
    return sizes
