"""The callbacks that take part in trial runs, and the batch size of a fit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from lightning.pytorch import Callback

from lightning_bigopt.batching.policies.batch_size_policy import BatchContext, BatchSizePolicy
from lightning_bigopt.batching.policies.fixed_batch import ConstantBatchSize
from lightning_bigopt.callbacks.batch_size.batch_size_scheduler import BatchSizeScheduler
from lightning_bigopt.callbacks.gradient_clipping import GradientClipping
from lightning_bigopt.callbacks.learning_rate import LearningRateScheduler
from lightning_bigopt.checks import shown
from lightning_bigopt.durations.progress import Progress
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.stage import Fit
from lightning_bigopt.optimizers.object_snapshot import copied
from lightning_bigopt.schedules.decays import Linear
from lightning_bigopt.trainer_access import loaders, strategies

__all__ = [
    "branch_callbacks",
    "callbacks_affecting_gradients",
    "current_batch_size",
    "new_copy",
    "samples_of_batches",
    "with_policy",
    "with_rule",
]

CapabilityT = TypeVar("CapabilityT", bound=Capability)


def callbacks_affecting_gradients(callbacks: Sequence[Callback]) -> list[Any]:
    """Copies the callbacks that affect gradients, in their initial state.

    These are GradientClipping, and BatchSizeScheduler with the first size of its policy.
    """
    copies: list[Any] = []
    for callback in callbacks:
        if isinstance(callback, BatchSizeScheduler):
            copies.append(with_policy(callback, _FirstSize(callback.policy)))
        elif isinstance(callback, GradientClipping):
            copies.append(with_rule(callback))
    return copies


def new_copy(capability: CapabilityT) -> CapabilityT:
    """Returns a copy of a capability in its initial state; call it outside of a fit."""
    copied_capability = copy.deepcopy(capability)
    copied_capability.reset()
    copied_capability.take_loaded_state()
    return copied_capability


def with_rule(clipping: GradientClipping, *, keep_state: bool = False) -> GradientClipping:
    """Returns a GradientClipping with the rule of another one, also of one in a fit.

    Args:
        clipping: The other capability, which may be of a subclass.
        keep_state: Whether it continues with the current state, such as the norms that the rule has
            seen; otherwise it starts as for a new run.
    """
    # Not a deep copy: within a fit the capability refers to the parameters.
    new = GradientClipping(clipping.rule, scope=clipping.scope)
    if keep_state:
        new.load_saved_state(copied(clipping.saved_state()))
    return new


def with_policy(scheduler: BatchSizeScheduler, policy: BatchSizePolicy) -> BatchSizeScheduler:
    """Returns a BatchSizeScheduler with the loader and loss settings of another one.

    Learning rate, beta2 and weight decay do not follow its batch size.

    Args:
        scheduler: The other scheduler, which may be of a subclass.
        policy: A policy that returns one size, and is not adaptive.
    """
    return BatchSizeScheduler(
        policy,
        weight=scheduler.weight,
        micro_batch_size=scheduler.micro_batch_size,
        max_micro_batch_size=scheduler.max_micro_batch_size,
        samples=scheduler.settings.samples,
        tokens=scheduler.settings.tokens,
    )


@dataclass(frozen=True)
class _FirstSize(BatchSizePolicy):
    """Constant batch size: the first size of another policy."""

    policy: BatchSizePolicy
    adaptive: ClassVar[bool] = False

    @property
    def rounding(self) -> Any:  # type: ignore[override]
        """The rounding of the other policy."""
        return self.policy.rounding

    def __call__(self, progress: Progress, *, context: BatchContext | None = None) -> int:
        """Returns the size of the other policy at the start of the budget."""
        return self.policy(Progress(fraction=0.0), context=context)


def branch_callbacks(fit: Fit, batch_size: int, *, cooldown: bool) -> list[Any]:
    """Returns the callbacks of a branch with another batch size.

    Args:
        fit: The fit, whose GradientClipping takes part with its state.
        batch_size: Global batch size of the branch, in samples.
        cooldown: Whether the learning rate decays linearly to 0.
    """
    policy = ConstantBatchSize(batch_size)
    scheduler = _batch_size_scheduler(fit)
    clipping = [c for c in fit.capabilities if isinstance(c, GradientClipping)]
    decay = [LearningRateScheduler(Linear(start=1.0, end=0.0))] if cooldown else []
    return [
        BatchSizeScheduler(policy) if scheduler is None else with_policy(scheduler, policy),
        *(with_rule(c, keep_state=True) for c in clipping),
        *decay,
    ]


def _batch_size_scheduler(fit: Fit) -> BatchSizeScheduler | None:
    return next((c for c in fit.capabilities if isinstance(c, BatchSizeScheduler)), None)


def current_batch_size(fit: Fit) -> int:
    """Returns the global batch size of the next update, in samples.

    Raises:
        ValueError: If the loader has no ``batch_size`` and there is no BatchSizeScheduler.
    """
    scheduler = _batch_size_scheduler(fit)
    if scheduler is not None:
        return scheduler.size_at(fit.clock.progress())
    return samples_of_batches(fit, int(fit.trainer.accumulate_grad_batches))


def samples_of_batches(fit: Fit, batches: int) -> int:
    """Returns the samples of a number of loader batches of each process, over all processes.

    Raises:
        ValueError: If the loader has no ``batch_size`` and there is no BatchSizeScheduler.
    """
    scheduler = _batch_size_scheduler(fit)
    given = None if scheduler is None else scheduler.micro_batch_size
    exact = loaders.exact_loader(fit.trainer)
    micro = given or (
        loaders.micro_batch_size(fit.trainer) if exact is None else exact.micro_batch_size
    )
    if micro is None:
        raise ValueError(
            "the training loader must have a batch_size to measure the critical batch size, got "
            f"{shown(loaders.train_loaders(fit.trainer))}; add BatchSizeScheduler("
            "ConstantBatchSize(...), micro_batch_size=samples in a batch of one process)"
        )
    return batches * micro * strategies.data_parallel_size(fit.trainer)
