"""The whole run in integers, before it begins: which update consumes what."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_bigopt.batching.geometry import ExactSamples, LoaderBatches
from lightning_bigopt.batching.plan import check_written_sizes
from lightning_bigopt.batching.policies import BatchContext, BatchSizePolicy, check_size
from lightning_bigopt.batching.run import Run
from lightning_bigopt.durations import Clock, Horizon, Progress

__all__ = ["planned_sizes", "simulate", "simulate_exact"]


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
    tokens_per_sample: int | None = None,
) -> Horizon:
    """Lays out a run on a DataLoader, by accumulation, from its first update to its last.

    A window never crosses an epoch. The last update is the last one that begins before the budget
    is consumed. A constant batch takes closed form, stairs take it from one threshold to the next,
    and any other policy is asked once an update.

    Args:
        policy: Names the global batch; not adaptive.
        clock: The unit of the budget.
        budget: The budget in that unit.
        micro_batch_size: The loader's batch on one process.
        world_size: Processes that see different data.
        batches_per_epoch: Batches of one process in an epoch; None for a stream, whose windows
            are never cut short.
        last_batch_samples: Samples in an epoch's last batch on one process; None for a full one.
        samples_per_epoch: What ``FullBatch`` is told; None to work it out from the batches.
        tokens_per_sample: Tokens in every sample; None where they vary or nobody counts them.

    Returns:
        The horizon. Its spans are empty where the clock or a threshold is in tokens and
        ``tokens_per_sample`` is None: percentages hold, and a conversion says why it cannot.

    Raises:
        ValueError: If the policy is adaptive, or a size does not fit.

    Example:
        >>> from lightning_bigopt.batching import BatchSizeSteps
        >>> run = simulate(
        ...     BatchSizeSteps({"0%": 8, "50%": 16}),
        ...     clock="batches",
        ...     budget=20,
        ...     micro_batch_size=4,
        ...     world_size=1,
        ...     batches_per_epoch=10,
        ...     last_batch_samples=3,
        ... )
        >>> [(span.updates, span.batches, span.samples) for span in run.spans]
        [(4, 2, 8), (1, 2, 7), (2, 4, 16), (1, 2, 7)]
    """
    check_size("world_size", world_size)
    check_size("micro_batch_size", micro_batch_size)
    if last_batch_samples is not None and not 1 <= last_batch_samples <= micro_batch_size:
        raise ValueError(
            f"last_batch_samples must be from 1 to micro_batch_size = {micro_batch_size}, got "
            f"{last_batch_samples!r}; count the samples of one process"
        )
    geometry = LoaderBatches(
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        batches_per_epoch=batches_per_epoch,
        last_batch_samples=last_batch_samples,
    )
    if samples_per_epoch is None and batches_per_epoch is not None:
        last = last_batch_samples or micro_batch_size
        samples_per_epoch = ((batches_per_epoch - 1) * micro_batch_size + last) * world_size
    check_written_sizes(policy, micro_batch_size=micro_batch_size, world_size=world_size)
    return _lay_out(
        policy,
        Run(geometry, clock=clock, budget=budget, tokens_per_sample=tokens_per_sample),
        batches_per_epoch=batches_per_epoch,
        context=BatchContext(samples_per_epoch=samples_per_epoch),
    )


def simulate_exact(
    policy: BatchSizePolicy,
    *,
    clock: Clock,
    budget: float,
    micro_batch_size: int,
    world_size: int,
    samples_per_epoch: int,
    tokens_per_sample: int | None = None,
) -> Horizon:
    """Lays out a run on a :class:`GlobalBatchLoader`, exact to the sample.

    Args:
        policy: Names the global batch; not adaptive.
        clock: The unit of the budget; not ``"batches"``, whose number depends on the plan.
        budget: The budget in that unit; epochs are ``epochs × samples_per_epoch`` samples.
        micro_batch_size: The most samples that one process puts through the model at a time.
        world_size: Processes that see different data.
        samples_per_epoch: Samples in one pass over the data.
        tokens_per_sample: Tokens in every sample; None where they vary or nobody counts them.

    Returns:
        The horizon, as from :func:`simulate`.

    Raises:
        ValueError: If the policy is adaptive, or ``clock`` is ``"batches"``.

    Example:
        >>> from lightning_bigopt.batching import ConstantBatchSize
        >>> run = simulate_exact(
        ...     ConstantBatchSize(7),
        ...     clock="samples",
        ...     budget=20,
        ...     micro_batch_size=2,
        ...     world_size=2,
        ...     samples_per_epoch=10,
        ... )
        >>> [(span.updates, span.batches, span.samples) for span in run.spans]
        [(1, 2, 7), (1, 1, 3), (1, 2, 7), (1, 1, 3)]
    """
    run = _exact_run(
        clock=clock,
        budget=budget,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        samples_per_epoch=samples_per_epoch,
        tokens_per_sample=tokens_per_sample,
    )
    context = BatchContext(samples_per_epoch=samples_per_epoch)
    return _lay_out(policy, run, batches_per_epoch=None, context=context)


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
    tokens_per_sample: int | None = None,
) -> Iterator[int]:
    """The global batches of the rest of an epoch: what a :class:`GlobalBatchLoader` is given.

    Args:
        policy: Names the global batch; not adaptive, because the loader reads ahead.
        start: The progress at ``position``.
        position: Samples of this epoch consumed so far.
        clock: The unit of the budget; not ``"batches"``.
        budget: The budget in that unit.
        micro_batch_size: The most samples that one process puts through the model at a time.
        world_size: Processes that see different data.
        samples_per_epoch: Samples in one pass over the data.
        tokens_per_sample: Tokens in every sample, for thresholds in tokens.

    Yields:
        One size an update, as the policy named it; the last may be more than what is left.

    Raises:
        ValueError: If the policy is adaptive, reads tokens that nobody counts, or ``clock`` is
            ``"batches"``.

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
    run = _exact_run(
        clock=clock,
        budget=budget,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        samples_per_epoch=samples_per_epoch,
        tokens_per_sample=tokens_per_sample,
    )
    _refuse_adaptive(policy)
    if tokens_per_sample is None and (clock == "tokens" or "tokens" in policy.units):
        raise ValueError(
            "tokens_per_sample must be given for a batch that changes by tokens on "
            "GlobalBatchLoader, got None; write thresholds and budget in samples or percent"
        )
    run.steps, run.batches, run.samples = start.steps, start.batches, start.samples
    run.position = position
    context = BatchContext(samples_per_epoch=samples_per_epoch)
    return _sizes(policy, run, context)


def _sizes(policy: BatchSizePolicy, run: Run, context: BatchContext) -> Iterator[int]:
    while True:
        size = policy(run.progress(), context=context)
        yield size
        _, advance, batches, samples = run.geometry.ahead(size, run.position)
        run.consume(1, advance, batches, samples)
        if run.position == 0:
            return


def _exact_run(
    *,
    clock: Clock,
    budget: float,
    micro_batch_size: int,
    world_size: int,
    samples_per_epoch: int,
    tokens_per_sample: int | None,
) -> Run:
    check_size("micro_batch_size", micro_batch_size)
    check_size("world_size", world_size)
    check_size("samples_per_epoch", samples_per_epoch)
    if clock == "batches":
        raise ValueError(
            "clock must be 'steps', 'samples' or 'tokens' with GlobalBatchLoader, got 'batches'; "
            "count epochs as epochs × samples_per_epoch samples"
        )
    geometry = ExactSamples(
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        samples_per_epoch=samples_per_epoch,
    )
    return Run(geometry, clock=clock, budget=budget, tokens_per_sample=tokens_per_sample)


def _refuse_adaptive(policy: BatchSizePolicy) -> None:
    if policy.adaptive:
        raise ValueError(
            "policy must be known in advance here, got the adaptive "
            f"{type(policy).__name__}; write the durations in percent or in the budget's own "
            "unit, and train on a DataLoader"
        )


def _lay_out(
    policy: BatchSizePolicy, run: Run, *, batches_per_epoch: int | None, context: BatchContext
) -> Horizon:
    _refuse_adaptive(policy)
    known = run.tokens_per_sample is not None or not (
        run.clock == "tokens" or "tokens" in policy.units
    )
    if known:
        stairs = policy.staircase(context=context)
        if stairs is None:
            run.walk(policy, context)
        else:
            run.climb(policy, stairs)
    return Horizon(
        clock=run.clock,
        budget=run.budget,
        spans=run.spans(),
        batches_per_epoch=batches_per_epoch,
    )
