"""BatchSizeScheduler."""

from __future__ import annotations

from lightning_bigopt.batching import BatchSizePolicy
from lightning_bigopt.callbacks.base import OptimizationCallback
from lightning_bigopt.clock import BatchCount, ClockSettings
from lightning_bigopt.controllers.batch_size import BatchSizeController

__all__ = ["BatchSizeScheduler"]


class BatchSizeScheduler(OptimizationCallback):
    """Trains every update on the global batch that a policy names, on the user's own DataLoader.

    The global batch is micro batch × accumulation × processes; the accumulation is worked out for
    the processes at hand and may change at any batch. Every update's gradient is the mean over the
    samples of its window, the last partial window of an epoch included.
    ``trainer.accumulate_grad_batches`` shows the length of the window under way.

    Args:
        policy: The global batch of every update.
        budget: An explicit budget such as ``"2e6 samples"`` that ends the training; None for the
            Trainer's limits.
        samples: Counts the samples in a batch (a function or a field's name); None for the
            loader's batch size.
        tokens: Counts the tokens in a batch (a function, or the name of an ids or mask field).

    Raises:
        ValueError: At fit start with ``accumulate_grad_batches`` other than 1,
            GradientAccumulationScheduler, StochasticWeightAveraging, DeepSpeed, manual
            optimisation or ``dataloader_iter``; at train start for a global batch that is no
            multiple of micro batch × processes.

    State:
        ``clock``: what has been consumed; ``window``: length and first batch of the window under
        way (a checkpoint inside a window loses its open gradients, and says so on resume).

    Example:
        >>> from lightning_bigopt import BatchSizeScheduler, BatchSizeSteps
        >>> BatchSizeScheduler(BatchSizeSteps({"0%": 32, "50%": 64}))
        BatchSizeScheduler(BatchSizeSteps(...))
    """

    controller: BatchSizeController

    def __init__(
        self,
        policy: BatchSizePolicy,
        *,
        budget: str | None = None,
        samples: BatchCount = None,
        tokens: BatchCount = None,
    ) -> None:
        settings = ClockSettings(budget=budget, samples=samples, tokens=tokens)
        super().__init__(BatchSizeController(policy, settings=settings))

    def __repr__(self) -> str:
        return f"BatchSizeScheduler({type(self.controller.policy).__name__}(...))"
