"""Where micro-batches come from: the user's own loader, or the exact one. One policy for both."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import repeat
from typing import TYPE_CHECKING, Any

from lightning_bigopt import trainer_access
from lightning_bigopt.batching import (
    BatchContext,
    BatchPlan,
    BatchSizePolicy,
    ConstantBatchSize,
    GlobalBatchLoader,
    check_written_sizes,
    plan_at,
    planned_sizes,
    simulate,
    simulate_exact,
)
from lightning_bigopt.durations import Clock, Horizon, Progress

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_bigopt.clock import Simulate
    from lightning_bigopt.pipeline import Pipeline

__all__ = ["Supply", "constant_plan", "hand_over", "look_at", "simulator"]


@dataclass(frozen=True, kw_only=True)
class Supply:
    """What a fit's loader gives, as plain numbers.

    Args:
        micro_batch_size: Samples in a full batch of one process; the most, on an exact loader.
        world_size: Processes that see different data.
        samples_per_epoch: Samples of all processes in an epoch; None where unknown.
        is_exact: Whether a GlobalBatchLoader serves every update to the sample.
        varies: Whether any batch may have fewer or more samples, not only an epoch's last.

    Example:
        >>> supply = Supply(micro_batch_size=8, world_size=2, samples_per_epoch=100)
        >>> size, plan = supply.plan(ConstantBatchSize(32), Progress(fraction=0.0))
        >>> size, plan.accumulate
        (32, 2)
    """

    micro_batch_size: int
    world_size: int
    samples_per_epoch: int | None
    is_exact: bool = False
    varies: bool = False

    def plan(
        self,
        policy: BatchSizePolicy,
        progress: Progress,
        *,
        before: int | None = None,
        noise_scale: float | None = None,
    ) -> tuple[int, BatchPlan]:
        """The global batch of the update that starts at ``progress``, and how it is carried out."""
        context = BatchContext(
            samples_per_epoch=self.samples_per_epoch,
            global_batch_size=before,
            noise_scale=noise_scale,
        )
        micro, world = self.micro_batch_size, self.world_size
        if not self.is_exact:
            plan = plan_at(
                policy,
                progress=progress,
                micro_batch_size=micro,
                world_size=world,
                context=context,
            )
            return plan.global_batch_size, plan
        size = policy(progress, context=context)
        accumulate = -(-size // (micro * world))
        return size, BatchPlan(micro_batch_size=micro, accumulate=accumulate, world_size=world)

    def renewed(self, found: Supply) -> Supply:
        """What a loader that was made anew in mid-fit gives.

        Raises:
            ValueError: If its batches are of another size, by which the run was laid out.
        """
        if not found.is_exact and found.micro_batch_size != self.micro_batch_size:
            raise ValueError(
                "the training loader must keep its batch_size with BatchSizeScheduler, got "
                f"{found.micro_batch_size} after {self.micro_batch_size}; keep it, and let the "
                "policy change the global batch"
            )
        return found

    def describe(self, size: int, plan: BatchPlan) -> str:
        """A global batch in words."""
        if not self.is_exact:
            return str(plan)
        return (
            f"{size} exactly, in {plan.accumulate} micro-batches of at most "
            f"{plan.micro_batch_size} on each of {plan.world_size} processes"
        )


def look_at(
    trainer: Trainer,
    policy: BatchSizePolicy,
    micro_batch_size: int | None,
    *,
    most: int | None = None,
) -> Supply:
    """Finds out what the loader gives; known from ``on_train_start`` on.

    Args:
        trainer: The Trainer.
        policy: Every size that the user wrote is checked.
        micro_batch_size: What the user says of a loader that does not say it.
        most: The largest micro-batch that the user allows.

    Raises:
        ValueError: If nobody says how many samples a batch has, or a size does not fit.
    """
    world, exact = trainer_access.data_parallel_size(trainer), trainer_access.exact_loader(trainer)
    if exact is not None:
        return Supply(
            micro_batch_size=exact.micro_batch_size,
            world_size=world,
            samples_per_epoch=exact.samples,
            is_exact=True,
        )
    micro = trainer_access.micro_batch_size(trainer)
    if micro is not None and micro_batch_size not in (None, micro):
        raise ValueError(
            f"micro_batch_size must be the loader's own batch_size, {micro}, or None, got "
            f"{micro_batch_size}; leave it out"
        )
    found = micro or micro_batch_size
    if found is None:
        kinds = [type(loader).__name__ for loader in trainer_access.train_loaders(trainer)]
        raise ValueError(
            f"the training loader must have a batch_size with BatchSizeScheduler, got {kinds}; "
            "pass BatchSizeScheduler(..., micro_batch_size=samples in a batch of one process), and "
            "samples= where the first tensor's rows are not the samples"
        )
    if most is not None and found > most:
        raise ValueError(
            f"the training loader's batch_size must be at most max_micro_batch_size = {most}, got "
            f"{found}; make it smaller, or return a GlobalBatchLoader, which cuts batches itself"
        )
    check_written_sizes(policy, micro_batch_size=found, world_size=world)
    return Supply(
        micro_batch_size=found,
        world_size=world,
        samples_per_epoch=trainer_access.epoch_samples(trainer),
        varies=micro is None or trainer_access.last_batch_samples(trainer) is None,
    )


def hand_over(
    pipeline: Pipeline, policy: BatchSizePolicy, loaders: list[Any], *, most: int | None = None
) -> None:
    """Tells an exact loader its place and its sizes, before it is asked for the first batch.

    Args:
        pipeline: The pipeline.
        policy: Names the global batches.
        loaders: The training loaders.
        most: The largest micro-batch that the user allows.

    Raises:
        ValueError: If it is not the only loader, the policy cannot be known in advance, or
            Lightning would cut its epochs.
    """
    exact = [loader for loader in loaders if isinstance(loader, GlobalBatchLoader)]
    if not exact:
        return
    trainer, loader = pipeline.trainer, exact[0]
    if len(loaders) > 1:
        raise ValueError(
            f"the training loader must be one GlobalBatchLoader alone, got {len(loaders)} loaders; "
            "combine their datasets into one"
        )
    if policy.adaptive:
        raise ValueError(
            f"policy must be known in advance with GlobalBatchLoader, got {type(policy).__name__}, "
            "which measures; train on a DataLoader"
        )
    tried = trainer_access.is_fast_dev_run(trainer)
    if trainer.limit_train_batches != 1.0 and not tried:
        raise ValueError(
            "limit_train_batches must be 1.0 with GlobalBatchLoader, got "
            f"{trainer.limit_train_batches}; set max_steps, or pass a torch Subset as dataset"
        )
    world = trainer_access.data_parallel_size(trainer)
    former = trainer_access.exact_loader(trainer)
    if former is not None and former is not loader:  # reload_dataloaders_every_n_epochs
        loader.load_state_dict(former.state_dict())
    if most is not None:
        loader.micro_batch_size = min(loader.micro_batch_size, most)
    loader.place(rank=trainer_access.data_rank(trainer), world_size=world)

    def sizes() -> Iterable[int]:
        pipeline.start_clock()
        share = loader.micro_batch_size * world
        if trainer_access.is_fast_dev_run(pipeline.trainer):
            return repeat(share)  # Lightning stops after a batch: no window may be longer
        horizon = pipeline.clock.horizon
        return planned_sizes(
            policy,
            start=pipeline.clock.progress(),
            position=loader.position,
            clock="samples" if horizon is None else horizon.clock,
            budget=float(sys.maxsize) if horizon is None else horizon.budget,
            micro_batch_size=loader.micro_batch_size,
            world_size=world,
            samples_per_epoch=loader.samples,
        )

    loader.plan(sizes)


def constant_plan(trainer: Trainer) -> Simulate:
    """The run under the Trainer's own accumulation.

    Raises:
        ValueError: If the loader is a GlobalBatchLoader, which needs somebody to plan for it.
    """
    if trainer_access.exact_loader(trainer) is not None:
        raise ValueError(
            "callbacks must hold BatchSizeScheduler with GlobalBatchLoader, got none, and the "
            "loader would serve every process all samples; add "
            "BatchSizeScheduler(ConstantBatchSize(256))"
        )
    micro = trainer_access.micro_batch_size(trainer) or 1
    world = trainer_access.data_parallel_size(trainer)
    size = micro * world * int(trainer.accumulate_grad_batches)
    return simulator(trainer, ConstantBatchSize(size))


def simulator(
    trainer: Trainer,
    policy: BatchSizePolicy,
    micro_batch_size: int | None = None,
    *,
    most: int | None = None,
) -> Simulate:
    """Lays a run out in advance, update by update."""
    said = trainer_access.micro_batch_size(trainer)
    world, exact = trainer_access.data_parallel_size(trainer), trainer_access.exact_loader(trainer)

    def run(clock: Clock, budget: float) -> Horizon:
        if clock == "tokens" or (clock == "samples" and said is None and exact is None):
            return Horizon(clock=clock, budget=budget)  # only counting will tell
        if exact is not None:
            return simulate_exact(
                policy,
                clock=clock,
                budget=budget,
                micro_batch_size=min(exact.micro_batch_size, most or exact.micro_batch_size),
                world_size=world,
                samples_per_epoch=exact.samples,
            )
        horizon = simulate(
            policy,
            clock=clock,
            budget=budget,
            micro_batch_size=said or micro_batch_size or 1,
            world_size=world,
            batches_per_epoch=trainer_access.epoch_batches(trainer),
            last_batch_samples=trainer_access.last_batch_samples(trainer),
        )
        if said is not None:
            return horizon
        return replace(horizon, spans=tuple(replace(s, samples=None) for s in horizon.spans))

    return run
