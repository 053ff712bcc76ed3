"""Copies of the Trainer's callbacks that take part in trial runs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from lightning.pytorch import Callback

from lightning_bigopt.batching.policies.batch_size_policy import BatchContext, BatchSizePolicy
from lightning_bigopt.callbacks.batch_size.batch_size_scheduler import BatchSizeScheduler
from lightning_bigopt.callbacks.gradient_clipping import GradientClipping
from lightning_bigopt.durations.progress import Progress
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.optimizers.object_snapshot import copied

__all__ = ["callbacks_affecting_gradients", "new_copy", "with_policy", "with_rule"]

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
