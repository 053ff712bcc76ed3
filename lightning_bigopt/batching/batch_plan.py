"""The plan of an update: global batch = micro-batch × accumulation × processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_bigopt.checks import check_choice, check_count, shown

__all__ = ["BatchPlan", "Rounding", "plan_update"]

Rounding: TypeAlias = Literal["exact", "nearest", "up"]


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The global batch of one update as a product of three factors.

    Args:
        micro_batch_size: Samples in a micro-batch of one process.
        accumulate: Micro-batches of one process in the update.
        world_size: Number of processes that see different data.

    Example:
        >>> plan = BatchPlan(micro_batch_size=8, accumulate=16, world_size=2)
        >>> print(plan)
        256 = micro-batch 8 × accumulation 16 × processes 2
    """

    micro_batch_size: int
    accumulate: int
    world_size: int

    @property
    def global_batch_size(self) -> int:
        """Samples in the update, over all processes."""
        return self.micro_batch_size * self.accumulate * self.world_size

    def __str__(self) -> str:
        return (
            f"{self.global_batch_size} = micro-batch {self.micro_batch_size} × accumulation "
            f"{self.accumulate} × processes {self.world_size}"
        )


def plan_update(
    global_batch_size: int,
    *,
    world_size: int,
    micro_batch_size: int | None = None,
    max_micro_batch_size: int | None = None,
    rounding: Rounding = "exact",
    name: str = "global_batch_size",
) -> BatchPlan:
    """Computes the accumulation for a global batch.

    Pass either ``micro_batch_size`` or ``max_micro_batch_size``.

    Args:
        global_batch_size: Samples in the update, over all processes.
        world_size: Number of processes that see different data.
        micro_batch_size: Samples in a loader batch of one process, if it is fixed.
        max_micro_batch_size: Largest micro-batch in samples that fits into memory, if the
            micro-batch can be chosen; the largest divisor up to it is taken.
        rounding: ``"exact"`` raises for a size that does not fit, ``"nearest"`` returns the nearest
            multiple (the larger of two equally near), ``"up"`` returns the next larger multiple.
        name: Name of the size in an error message.

    Returns:
        The plan.

    Raises:
        ValueError: If the size is not positive or does not fit; the message names the nearest
            sizes that do.

    Example:
        >>> plan_update(256, micro_batch_size=8, world_size=2)
        BatchPlan(micro_batch_size=8, accumulate=16, world_size=2)
        >>> plan_update(250, micro_batch_size=8, world_size=2, rounding="nearest").global_batch_size
        256
        >>> plan_update(96, max_micro_batch_size=40, world_size=1)
        BatchPlan(micro_batch_size=32, accumulate=3, world_size=1)
    """
    check_count(name, global_batch_size, of="samples", hint="write an int such as 256")
    check_count("world_size", world_size, of="processes")
    check_choice("rounding", rounding, Rounding)
    if (micro_batch_size is None) == (max_micro_batch_size is None):
        raise ValueError(
            "micro_batch_size or max_micro_batch_size must be given, and not both, got "
            f"{shown(micro_batch_size)} and {shown(max_micro_batch_size)}; pass the loader's "
            "batch_size as micro_batch_size"
        )
    if micro_batch_size is None:
        assert max_micro_batch_size is not None  # checked above
        check_count("max_micro_batch_size", max_micro_batch_size, of="samples")
        share = _multiple(global_batch_size, 1, world_size, rounding, name)
        # A divisor, so that all micro-batches of the update have the same size.
        micro = next(m for m in range(min(share, max_micro_batch_size), 0, -1) if share % m == 0)
        return BatchPlan(micro_batch_size=micro, accumulate=share // micro, world_size=world_size)
    check_count("micro_batch_size", micro_batch_size, of="samples")
    accumulate = _multiple(global_batch_size, micro_batch_size, world_size, rounding, name)
    return BatchPlan(
        micro_batch_size=micro_batch_size, accumulate=accumulate, world_size=world_size
    )


def _multiple(size: int, micro: int, world: int, rounding: Rounding, name: str) -> int:
    """Returns the rounded quotient of size and micro × world, at least 1."""
    grain = micro * world
    whole, rest = divmod(size, grain)
    if rounding == "up":
        return whole + (rest > 0)
    if rounding == "nearest":
        whole += 2 * rest >= grain
    elif rest and whole:
        below, above = whole * grain, (whole + 1) * grain
        raise ValueError(
            f"{name} must be a multiple of micro_batch_size × processes = {micro} × {world} = "
            f"{grain}, got {size}; write {below} or {above}, or change micro_batch_size"
        )
    if not whole:
        smaller = size // world
        raise ValueError(
            f"{name} must be at least micro_batch_size × processes = {micro} × {world} = {grain}, "
            f"got {size}; write {grain}, or "
            + (f"set micro_batch_size to {smaller}" if smaller else f"use {size} process(es)")
        )
    return whole
