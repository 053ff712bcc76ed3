"""Simulates the batch sizes of a run in integers before it starts, update by update."""

from __future__ import annotations

from lightning_bigopt.batching.epoch_layout import EpochLayout, ExactSamples, LoaderBatches, Tail
from lightning_bigopt.batching.policies.batch_size_policy import (
    BatchContext,
    BatchSizePolicy,
    check_explicit_sizes,
)
from lightning_bigopt.batching.simulated_run import SimulatedRun
from lightning_bigopt.checks import check_between, check_choice, check_count, check_positive, shown
from lightning_bigopt.durations.duration import Clock
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.durations.progress import Span
from lightning_bigopt.type_checks import check_instance

__all__ = ["check_not_adaptive", "depends_on_tokens", "exact_layout", "simulate", "simulate_exact"]


def simulate(
    policy: BatchSizePolicy,
    *,
    clock: Clock,
    budget: float,
    micro_batch_size: int,
    world_size: int,
    batches_per_epoch: int | None,
    last_batch_samples: int | None = None,
    samples_per_epoch: int | None = None,
) -> Horizon:
    """Simulates a run on a DataLoader, which accumulates whole loader batches.

    An accumulation window never crosses the end of an epoch. The last update is the last one that
    begins before the budget is consumed. A policy with a step function takes one closed-form step
    per threshold; any other policy is called once per update.

    Args:
        policy: Policy that sets the global batches; must not be adaptive.
        clock: Unit of the budget.
        budget: The budget in that unit; positive and finite.
        micro_batch_size: Samples in a loader batch of one process.
        world_size: Number of processes that see different data.
        batches_per_epoch: Batches of one process in an epoch; None for a stream, which never cuts
            a window short.
        last_batch_samples: Samples in the last batch of an epoch on one process; None for a full
            batch.
        samples_per_epoch: Samples of all processes in an epoch, for ``FullBatch``; None to
            compute them from the batches.

    Returns:
        The horizon. It has no spans if the budget or a threshold is in tokens, which depend on the
        data: percentages can then be resolved, and other units raise.

    Raises:
        ValueError: If the policy is adaptive, a size does not fit, or an argument is out of range.

    Example:
        >>> from lightning_bigopt.batching import BatchSizeSteps
        >>> horizon = simulate(
        ...     BatchSizeSteps({"0%": 8, "50%": 16}),
        ...     clock="batches",
        ...     budget=20,
        ...     micro_batch_size=4,
        ...     world_size=1,
        ...     batches_per_epoch=10,
        ...     last_batch_samples=3,
        ... )
        >>> [(span.updates, span.batches, span.samples) for span in horizon.spans]
        [(4, 2, 8), (1, 2, 7), (2, 4, 16), (1, 2, 7)]
    """
    check_count("world_size", world_size, of="processes")
    check_count("micro_batch_size", micro_batch_size, of="samples")
    if batches_per_epoch is not None:
        check_count("batches_per_epoch", batches_per_epoch, of="batches", hint="None if unknown")
    if samples_per_epoch is not None:
        check_count("samples_per_epoch", samples_per_epoch, of="samples", hint="None if unknown")
    if last_batch_samples is not None and not (
        type(last_batch_samples) is int and 1 <= last_batch_samples <= micro_batch_size
    ):
        raise ValueError(
            f"last_batch_samples must be from 1 to micro_batch_size = {micro_batch_size}, got "
            f"{shown(last_batch_samples)}; count the samples of one process"
        )
    layout = LoaderBatches(
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        batches_per_epoch=batches_per_epoch,
        last_batch_samples=last_batch_samples,
    )
    if samples_per_epoch is None and batches_per_epoch is not None:
        last = last_batch_samples or micro_batch_size
        samples_per_epoch = ((batches_per_epoch - 1) * micro_batch_size + last) * world_size
    check_explicit_sizes(policy, micro_batch_size=micro_batch_size, world_size=world_size)
    return Horizon(
        clock=clock,
        budget=budget,
        spans=_spans(
            policy,
            layout,
            clock=clock,
            budget=budget,
            context=BatchContext(samples_per_epoch=samples_per_epoch),
        ),
        batches_per_epoch=batches_per_epoch,
    )


def simulate_exact(
    policy: BatchSizePolicy,
    *,
    clock: Clock,
    budget: float,
    micro_batch_size: int,
    world_size: int,
    samples_per_epoch: int,
    tail: Tail = "keep",
) -> Horizon:
    """Simulates a run on a :class:`GlobalBatchLoader`, which yields any global batch exactly.

    Args:
        policy: Policy that sets the global batches; must not be adaptive.
        clock: Unit of the budget; not ``"batches"``, whose number depends on the policy.
        budget: The budget in that unit; epochs are ``epochs × samples_per_epoch`` samples.
        micro_batch_size: Largest number of samples in a micro-batch of one process.
        world_size: Number of processes that see different data.
        samples_per_epoch: Samples in one pass over the data.
        tail: Treatment of the end of an epoch, as for the loader.

    Returns:
        The horizon, as from :func:`simulate`.

    Raises:
        ValueError: If the policy is adaptive, ``clock`` is ``"batches"``, or an argument is out of
            range.

    Example:
        >>> from lightning_bigopt.batching import ConstantBatchSize
        >>> horizon = simulate_exact(
        ...     ConstantBatchSize(7),
        ...     clock="samples",
        ...     budget=20,
        ...     micro_batch_size=2,
        ...     world_size=2,
        ...     samples_per_epoch=10,
        ... )
        >>> [(span.updates, span.batches, span.samples) for span in horizon.spans]
        [(1, 2, 7), (1, 1, 3), (1, 2, 7), (1, 1, 3)]
    """
    layout = exact_layout(
        clock=clock,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        samples_per_epoch=samples_per_epoch,
        tail=tail,
    )
    context = BatchContext(samples_per_epoch=samples_per_epoch)
    return Horizon(
        clock=clock,
        budget=budget,
        spans=_spans(policy, layout, clock=clock, budget=budget, context=context),
    )


def exact_layout(
    *,
    clock: Clock,
    micro_batch_size: int,
    world_size: int,
    samples_per_epoch: int,
    tail: Tail = "keep",
) -> ExactSamples:
    """Returns the layout of an epoch of a GlobalBatchLoader, after checks of its arguments."""
    check_count("micro_batch_size", micro_batch_size, of="samples")
    check_count("world_size", world_size, of="processes")
    check_count("samples_per_epoch", samples_per_epoch, of="samples")
    check_choice("clock", clock, Clock)
    if clock == "batches":
        raise ValueError(
            "clock must be 'steps', 'samples' or 'tokens' with GlobalBatchLoader, got 'batches'; "
            "count epochs as epochs × samples_per_epoch samples"
        )
    return ExactSamples(
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        samples_per_epoch=samples_per_epoch,
        tail=tail,
    )


def check_not_adaptive(policy: BatchSizePolicy) -> None:
    """Raises for a policy that depends on measurements."""
    check_instance("policy", policy, BatchSizePolicy, hint="write ConstantBatchSize(256)")
    if policy.adaptive:
        raise ValueError(
            "policy must be known in advance here, got the adaptive "
            f"{type(policy).__name__}; write the durations in percent or in the unit of the "
            "budget, and train on a DataLoader"
        )


def depends_on_tokens(policy: BatchSizePolicy, clock: Clock) -> bool:
    """Returns whether the batch sizes depend on counts of tokens, which are unknown in advance."""
    return clock == "tokens" or "tokens" in policy.units


def _spans(
    policy: BatchSizePolicy,
    layout: EpochLayout,
    *,
    clock: Clock,
    budget: float,
    context: BatchContext,
) -> tuple[Span, ...]:
    """Returns the spans of a run from its first update; none if it depends on tokens."""
    check_choice("clock", clock, Clock)
    check_positive("budget", budget)
    check_between("budget", budget, 0, 2**53, ends="(]", hint="shorten it")
    check_not_adaptive(policy)
    if depends_on_tokens(policy, clock):
        return ()
    run = SimulatedRun(layout, clock=clock, budget=budget)
    steps = policy.step_function(context=context)
    if steps is None:
        run.simulate_per_update(policy, context)
    else:
        run.simulate_steps(policy, steps)
    return run.spans()
