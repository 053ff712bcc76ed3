"""The global batches of the rest of an epoch, for a GlobalBatchLoader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from lightning_bigopt.batching.epoch_layout import ExactSamples
from lightning_bigopt.batching.policies.batch_size_policy import BatchContext, BatchSizePolicy
from lightning_bigopt.batching.simulation import (
    check_not_adaptive,
    depends_on_tokens,
    exact_layout,
)
from lightning_bigopt.checks import check_choice, check_count, check_positive, shown
from lightning_bigopt.durations.duration import Clock
from lightning_bigopt.durations.progress import Progress
from lightning_bigopt.type_checks import check_instance

__all__ = ["ProgressAfter", "planned_sizes", "sizes_in_epoch"]


class ProgressAfter(Protocol):
    """Progress in the rest of an epoch."""

    def __call__(self, *, steps: int, batches: int, samples: int) -> Progress:
        """Returns the progress after further updates, batches of one process, and samples."""


def planned_sizes(
    policy: BatchSizePolicy,
    *,
    start: Progress,
    position: int,
    clock: Clock,
    budget: float,
    micro_batch_size: int,
    world_size: int,
    samples_per_epoch: int,
) -> Iterator[int]:
    """Yields the global batches of the rest of an epoch, for a :class:`GlobalBatchLoader`.

    Args:
        policy: Policy that sets the global batches; must not be adaptive, because the workers of
            the loader fetch batches ahead of the training.
        start: Progress at ``position``.
        position: Samples of this epoch consumed so far.
        clock: Unit of the budget; neither ``"batches"`` nor ``"tokens"``.
        budget: The budget in that unit; positive and finite.
        micro_batch_size: Largest number of samples in a micro-batch of one process.
        world_size: Number of processes that see different data.
        samples_per_epoch: Samples in one pass over the data.

    Yields:
        One size per update, in samples, as the policy returns it; the last one may exceed the rest
        of the epoch. They are the same for every ``tail`` of the loader, which may not use the last
        one.

    Raises:
        ValueError: If the policy is adaptive or reads tokens, ``clock`` is ``"batches"`` or
            ``"tokens"``, or an argument is out of range.

    Example:
        >>> from lightning_bigopt.batching import BatchSizeSteps
        >>> policy = BatchSizeSteps({"0%": 2, "50%": 4})
        >>> list(
        ...     planned_sizes(
        ...         policy,
        ...         start=Progress(fraction=0.2, steps=1, samples=2),
        ...         position=2,
        ...         clock="samples",
        ...         budget=10,
        ...         micro_batch_size=2,
        ...         world_size=1,
        ...         samples_per_epoch=10,
        ...     )
        ... )
        [2, 2, 4]
    """
    check_instance("policy", policy, BatchSizePolicy, hint="write ConstantBatchSize(256)")
    check_instance("start", start, Progress, hint="write Progress(fraction=0.0)")
    check_choice("clock", clock, ("steps", "batches", "samples", "tokens"))
    check_count("position", position, minimum=0, of="samples")
    check_count("micro_batch_size", micro_batch_size, of="samples")
    check_count("world_size", world_size, of="processes")
    check_count("samples_per_epoch", samples_per_epoch, of="samples")
    check_positive("budget", budget)

    def progress_after(*, steps: int, batches: int, samples: int) -> Progress:
        amounts = {
            "steps": start.steps + steps,
            "batches": start.batches + batches,
            "samples": start.samples + samples,
        }
        return Progress(
            fraction=amounts[clock] / budget,
            epochs=amounts["samples"] / samples_per_epoch,
            **amounts,
        )

    return sizes_in_epoch(
        policy,
        progress_after=progress_after,
        position=position,
        clock=clock,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        samples_per_epoch=samples_per_epoch,
    )


def sizes_in_epoch(
    policy: BatchSizePolicy,
    *,
    progress_after: ProgressAfter,
    position: int,
    clock: Clock,
    micro_batch_size: int,
    world_size: int,
    samples_per_epoch: int,
) -> Iterator[int]:
    """Yields the global batches of the rest of an epoch, as :func:`planned_sizes`.

    Args:
        policy: Policy that sets the global batches; must not be adaptive.
        progress_after: Returns the progress after further amounts from ``position`` on.
        position: Samples of this epoch consumed so far.
        clock: Unit of the budget; neither ``"batches"`` nor ``"tokens"``.
        micro_batch_size: Largest number of samples in a micro-batch of one process.
        world_size: Number of processes that see different data.
        samples_per_epoch: Samples in one pass over the data.

    Raises:
        ValueError: As :func:`planned_sizes`.
    """
    layout = exact_layout(
        clock=clock,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        samples_per_epoch=samples_per_epoch,
    )
    check_not_adaptive(policy)
    if depends_on_tokens(policy, clock):
        raise ValueError(
            "thresholds and budget must not be in tokens with GlobalBatchLoader, whose workers "
            f"fetch batches before their tokens are counted, got {shown(policy)} and a budget in "
            f"{clock}; write them in samples or percent"
        )
    context = BatchContext(samples_per_epoch=samples_per_epoch)
    return _sizes_from(policy, context, layout, progress_after, position)


def _sizes_from(
    policy: BatchSizePolicy,
    context: BatchContext,
    layout: ExactSamples,
    progress_after: ProgressAfter,
    position: int,
) -> Iterator[int]:
    steps = batches = samples = 0
    while position + samples < layout.length:
        size = policy(
            progress_after(steps=steps, batches=batches, samples=samples), context=context
        )
        yield size
        window = layout.next_windows(size, position + samples)
        steps, batches, samples = steps + 1, batches + window.batches, samples + window.samples
