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

__all__ = ["callbacks_affecting_gradients", "copy_for_trial", "with_policy"]

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
            copies.append(copy_for_trial(callback))
    return copies


def copy_for_trial(capability: CapabilityT, *, keep_state: bool = False) -> CapabilityT:
    """Returns a copy of a capability.

    Args:
        capability: The capability.
        keep_state: Whether the copy continues with the current state, such as the norms that a
            clipping rule has seen; otherwise it starts as for a new run.
    """
    copied = copy.deepcopy(capability)
    if keep_state:
        copied.run = None  # another engine clears the state of capabilities of another run
    else:
        copied.reset()
        copied.take_loaded_state()
    return copied


def with_policy(scheduler: BatchSizeScheduler, policy: BatchSizePolicy) -> BatchSizeScheduler:
    """Returns a copy of a BatchSizeScheduler in its initial state, with a policy of one size.

    Learning rate, beta2 and weight decay do not follow the batch size of the copy.

    Args:
        scheduler: The scheduler.
        policy: A policy that returns one size, and is not adaptive.
    """
    copied = copy_for_trial(scheduler)
    copied.policy, copied.requires, copied.needs_horizon = policy, (), False
    copied.coupling = type(copied.coupling)()
    return copied


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
