"""The batch sizes of the training loader, and simulations of a run on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lightning_bigopt.batching.batch_plan import BatchPlan
from lightning_bigopt.batching.policies.batch_size_policy import (
    BatchContext,
    BatchSizePolicy,
    check_explicit_sizes,
    plan_at,
)
from lightning_bigopt.batching.policies.fixed_batch import ConstantBatchSize
from lightning_bigopt.batching.policies.steps_and_ramps import BatchSizeSteps
from lightning_bigopt.batching.simulation import simulate, simulate_exact
from lightning_bigopt.durations.duration import Clock as ClockUnit
from lightning_bigopt.durations.duration import amount_of
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.durations.progress import Progress
from lightning_bigopt.engine.budget import Simulate
from lightning_bigopt.trainer_access import callbacks as trainer_callbacks
from lightning_bigopt.trainer_access import loaders, loop, strategies

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["BatchSource", "simulate_constant", "simulator"]


@dataclass(frozen=True, kw_only=True)
class BatchSource:
    """The batch sizes of the training loader of a fit, as plain numbers.

    Args:
        micro_batch_size: Samples in a full batch of one process; an upper bound for a
            GlobalBatchLoader.
        world_size: Number of processes that train on different data.
        samples_per_epoch: Samples of an epoch over all processes; None if unknown.
        is_exact: Whether the loader is a GlobalBatchLoader.
        varies: Whether any batch may have another size, not only the last of an epoch.

    Example:
        >>> source = BatchSource(micro_batch_size=8, world_size=2, samples_per_epoch=100)
        >>> size, plan = source.plan(ConstantBatchSize(32), Progress(fraction=0.0))
        >>> size, plan.accumulate
        (32, 2)
    """

    micro_batch_size: int
    world_size: int
    samples_per_epoch: int | None
    is_exact: bool = False
    varies: bool = False

    @classmethod
    def from_trainer(
        cls,
        trainer: Trainer,
        policy: BatchSizePolicy,
        *,
        micro_batch_size: int | None = None,
        max_micro_batch_size: int | None = None,
    ) -> BatchSource:
        """Reads the batch sizes from the Trainer's loader; call it from ``on_train_start`` on.

        Args:
            trainer: The Trainer.
            policy: The policy; its explicit sizes are checked against the loader.
            micro_batch_size: Samples in a batch of one process, for a loader without
                ``batch_size``.
            max_micro_batch_size: Upper bound of the samples in a batch; None for no bound.

        Raises:
            ValueError: If the size of a batch is unknown or too large, or an explicit size of the
                policy cannot be trained with it.
        """
        world, exact = strategies.data_parallel_size(trainer), loaders.exact_loader(trainer)
        if exact is not None:
            return cls(
                micro_batch_size=exact.micro_batch_size,
                world_size=world,
                samples_per_epoch=exact.samples,
                is_exact=True,
            )
        micro = loaders.micro_batch_size(trainer)
        if micro is not None and micro_batch_size not in (None, micro):
            raise ValueError(
                f"micro_batch_size must be the loader's own batch_size, {micro}, or None, got "
                f"{micro_batch_size}; remove it"
            )
        size = micro or micro_batch_size
        if size is None:
            kinds = [type(loader).__name__ for loader in loaders.train_loaders(trainer)]
            raise ValueError(
                f"the training loader must have a batch_size with BatchSizeScheduler, got {kinds}; "
                "pass BatchSizeScheduler(..., micro_batch_size=samples in a batch of one process), "
                "and samples= if the rows of the first tensor are not the samples"
            )
        if max_micro_batch_size is not None and size > max_micro_batch_size:
            raise ValueError(
                "the training loader's batch_size must be at most max_micro_batch_size = "
                f"{max_micro_batch_size}, got {size}; make it smaller, or return a "
                "GlobalBatchLoader, which makes batches of any size"
            )
        check_explicit_sizes(policy, micro_batch_size=size, world_size=world)
        return cls(
            micro_batch_size=size,
            world_size=world,
            samples_per_epoch=loaders.epoch_samples(trainer),
            varies=micro is None or loaders.last_batch_samples(trainer) is None,
        )

    def plan(
        self,
        policy: BatchSizePolicy,
        progress: Progress,
        *,
        current: int | None = None,
        noise_scale: float | None = None,
    ) -> tuple[int, BatchPlan]:
        """Plans the update that starts at ``progress``.

        Args:
            policy: The policy of the global batch size.
            progress: Progress at the start of the update.
            current: Global batch size of the previous update; None before the first.
            noise_scale: The current noise scale in samples, for an adaptive policy.

        Returns:
            The global batch size and its split into micro-batches.
        """
        context = BatchContext(
            samples_per_epoch=self.samples_per_epoch,
            global_batch_size=current,
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
        accumulate = -(-size // (micro * world))  # rounded up: the loader makes smaller batches
        return size, BatchPlan(micro_batch_size=micro, accumulate=accumulate, world_size=world)

    @property
    def largest_batch(self) -> int | None:
        """Samples in the largest batch of an epoch, in whole micro-batches; None if unknown."""
        if self.samples_per_epoch is None:
            return None
        step = 1 if self.is_exact else self.micro_batch_size * self.world_size
        return -(-self.samples_per_epoch // step) * step

    def check_unchanged(self, other: BatchSource) -> BatchSource:
        """Returns the source of a new loader during a fit, after checking its batch size.

        Raises:
            ValueError: If its batch size differs from this one, with which the run was planned.
        """
        if not other.is_exact and other.micro_batch_size != self.micro_batch_size:
            raise ValueError(
                "the training loader must keep its batch_size with BatchSizeScheduler, got "
                f"{other.micro_batch_size} after {self.micro_batch_size}; keep it, and let the "
                "policy change the global batch"
            )
        return other

    def describe(self, size: int, plan: BatchPlan) -> str:
        """Describes a global batch and its micro-batches."""
        if not self.is_exact:
            return str(plan)
        return (
            f"{size} exactly, in {amount_of(plan.accumulate, 'micro-batches')} of at most "
            f"{plan.micro_batch_size}"
            + (f" on each of {plan.world_size} processes" if plan.world_size > 1 else "")
        )


def simulate_constant(trainer: Trainer) -> Simulate:
    """Returns a simulation of a run with the accumulation of the Trainer.

    A GradientAccumulationScheduler of Lightning is followed.

    Raises:
        ValueError: If the loader is a GlobalBatchLoader, whose batch sizes must be set.
    """
    if loaders.exact_loader(trainer) is not None:
        raise ValueError(
            "callbacks must contain BatchSizeScheduler with GlobalBatchLoader, got none (every "
            "process would train on all samples); add "
            "BatchSizeScheduler(ConstantBatchSize(256))"
        )
    micro = loaders.micro_batch_size(trainer) or 1
    batch = micro * strategies.data_parallel_size(trainer)
    lengths = trainer_callbacks.accumulation_schedule(trainer)
    if len(set(lengths.values())) > 1:
        sizes = tuple((f"{epoch} epochs", batch * length) for epoch, length in lengths.items())
        return simulator(trainer, BatchSizeSteps(sizes))
    return simulator(trainer, ConstantBatchSize(batch * lengths[0]))


def simulator(
    trainer: Trainer,
    policy: BatchSizePolicy,
    *,
    micro_batch_size: int | None = None,
    max_micro_batch_size: int | None = None,
) -> Simulate:
    """Returns a simulation of a run under a policy.

    Args:
        trainer: The Trainer, after its loaders are set up.
        policy: A policy that does not depend on measurements.
        micro_batch_size: Samples in a batch of one process, for a loader without ``batch_size``.
        max_micro_batch_size: Upper bound of the samples in a batch of a GlobalBatchLoader.

    Returns:
        A function of the unit and amount of the budget that returns the horizon of the run.
    """
    known = loaders.micro_batch_size(trainer)
    world, exact = strategies.data_parallel_size(trainer), loaders.exact_loader(trainer)

    def run(unit: ClockUnit, budget: float) -> Horizon:
        if unit in ("tokens", "seconds") or (unit == "samples" and known is None and exact is None):
            # The amounts of a batch are known only after counting them: no updates in advance.
            return Horizon(clock=unit, budget=budget)
        if exact is not None:
            limit = max_micro_batch_size or exact.micro_batch_size
            return simulate_exact(
                policy,
                clock=unit,
                budget=budget,
                micro_batch_size=min(exact.micro_batch_size, limit),
                world_size=world,
                samples_per_epoch=exact.samples,
                tail=exact.tail,
            )
        horizon = simulate(
            policy,
            clock=unit,
            budget=budget,
            micro_batch_size=known or micro_batch_size or 1,
            world_size=world,
            batches_per_epoch=loop.epoch_batches(trainer),
            last_batch_samples=loaders.last_batch_samples(trainer),
        )
        if known is not None:
            return horizon
        # Updates and batches are right for any size of the batches; the samples are not.
        return replace(horizon, spans=tuple(replace(s, samples=None) for s in horizon.spans))

    return run
