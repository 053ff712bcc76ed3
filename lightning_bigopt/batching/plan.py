"""The plan of an update: global batch = micro-batch × accumulation × processes."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_bigopt.batching.policies import BatchContext, BatchSizePolicy, Rounding, check_size
from lightning_bigopt.durations import Progress

__all__ = ["BatchPlan", "check_written_sizes", "plan_at", "plan_update"]


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How one update's global batch is carried out.

    Args:
        micro_batch_size: Samples that one process puts through the model at a time.
        accumulate: Micro-batches of one process in the update.
        world_size: Processes that see different data.

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
        """Samples of the update over all processes."""
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
    """Works out the accumulation for a global batch.

    Args:
        global_batch_size: Samples of the update over all processes.
        world_size: Processes that see different data.
        micro_batch_size: The loader's batch, where it is given.
        max_micro_batch_size: Where the loader's batch may still be chosen: the largest that fits
            into memory; the largest divisor up to it is taken.
        rounding: ``"exact"`` raises for a size that does not fit, ``"nearest"`` takes the nearest
            multiple (the larger of two), ``"up"`` the next multiple.
        name: What to call the size in an error.

    Returns:
        The plan.

    Raises:
        ValueError: If the size is not positive or does not fit, with the nearest sizes that do.

    Example:
        >>> plan_update(256, micro_batch_size=8, world_size=2)
        BatchPlan(micro_batch_size=8, accumulate=16, world_size=2)
        >>> plan_update(250, micro_batch_size=8, world_size=2, rounding="nearest").global_batch_size
        256
        >>> plan_update(96, max_micro_batch_size=40, world_size=1)
        BatchPlan(micro_batch_size=32, accumulate=3, world_size=1)
    """
    check_size(name, global_batch_size)
    check_size("world_size", world_size)
    if (micro_batch_size is None) == (max_micro_batch_size is None):
        raise ValueError(
            "micro_batch_size or max_micro_batch_size must be given, and not both, got "
            f"{micro_batch_size!r} and {max_micro_batch_size!r}; pass the loader's batch_size as "
            "micro_batch_size"
        )
    if micro_batch_size is None:
        assert max_micro_batch_size is not None  # one of the two is given
        check_size("max_micro_batch_size", max_micro_batch_size)
        share = _multiple(global_batch_size, 1, world_size, rounding, name)
        micro = next(m for m in range(min(share, max_micro_batch_size), 0, -1) if share % m == 0)
        return BatchPlan(micro_batch_size=micro, accumulate=share // micro, world_size=world_size)
    check_size("micro_batch_size", micro_batch_size)
    accumulate = _multiple(global_batch_size, micro_batch_size, world_size, rounding, name)
    return BatchPlan(
        micro_batch_size=micro_batch_size, accumulate=accumulate, world_size=world_size
    )


def plan_at(
    policy: BatchSizePolicy,
    *,
    progress: Progress,
    micro_batch_size: int,
    world_size: int,
    context: BatchContext | None = None,
) -> BatchPlan:
    """The plan of the update that starts at ``progress``, rounded as the policy allows.

    Args:
        policy: Names the global batch.
        progress: Where the update starts.
        micro_batch_size: The loader's batch on one process.
        world_size: Processes that see different data.
        context: What else the policy may know.

    Returns:
        The plan.

    Raises:
        ValueError: If the size does not fit.

    Example:
        >>> from lightning_bigopt.batching import BatchSizeRamp
        >>> ramp = BatchSizeRamp(start=32, end=64, over="10%")
        >>> plan_at(ramp, progress=Progress(fraction=0.04), micro_batch_size=8, world_size=1)
        BatchPlan(micro_batch_size=8, accumulate=6, world_size=1)
    """
    return plan_update(
        policy(progress, context=context or BatchContext()),
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        rounding=policy.rounding,
        name=f"the global batch of {type(policy).__name__}",
    )


def check_written_sizes(policy: BatchSizePolicy, *, micro_batch_size: int, world_size: int) -> None:
    """Refuses, before the first batch, every size that the user wrote and that does not fit.

    Args:
        policy: The policy; see :attr:`BatchSizePolicy.written_sizes`.
        micro_batch_size: The loader's batch on one process.
        world_size: Processes that see different data.

    Raises:
        ValueError: For the first size that does not fit.

    Example:
        >>> from lightning_bigopt.batching import BatchSizeSteps
        >>> policy = BatchSizeSteps({"0%": 32, "50%": 60})
        >>> check_written_sizes(policy, micro_batch_size=8, world_size=2)
        Traceback (most recent call last):
        ...
        ValueError: sizes['50%'] must be a multiple of micro_batch_size × processes = 8 × 2 = 16, \
got 60; write 48 or 64, or change micro_batch_size
    """
    for name, size in policy.written_sizes.items():
        plan_update(size, micro_batch_size=micro_batch_size, world_size=world_size, name=name)


def _multiple(size: int, micro: int, world: int, rounding: Rounding, name: str) -> int:
    """How many times micro × world goes into the size."""
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
