"""BatchSizeScheduler."""

from __future__ import annotations

from typing import Literal

from lightning_bigopt.batching import BatchSizePolicy, ScalingRule
from lightning_bigopt.callbacks.base import OptimizationCallback
from lightning_bigopt.clock import ClockSettings
from lightning_bigopt.controllers.batch_coupling import BatchCoupling
from lightning_bigopt.controllers.batch_size import BatchSizeController
from lightning_bigopt.counting import BatchCount, BatchWeight
from lightning_bigopt.durations import DurationLike

__all__ = ["BatchSizeScheduler"]


class BatchSizeScheduler(OptimizationCallback):
    """Trains every update on the global batch that a policy names.

    The global batch is micro-batch × accumulation × processes; the accumulation is worked out for
    the processes at hand and may change at any batch. Every update's gradient is the mean over the
    samples of its window, the last partial window of an epoch included.
    ``trainer.accumulate_grad_batches`` shows the length of the window under way. The plan of the
    run is printed once.

    On the user's own DataLoader nothing has to change, and a global batch is a multiple of
    micro-batch × processes. Where the training loader is a :class:`GlobalBatchLoader`, any size is
    exact to the sample, in the same order on any number of processes, and a checkpoint at any batch
    resumes exactly.

    Args:
        policy: The global batch of every update.
        lr_scaling: How the learning rate follows the batch, relative to the run's first one, by κ:
            ``"sqrt"`` for Adam and its kin, ``"linear"`` for SGD, None to leave it alone. Works on
            top of LearningRateScheduler, or alone.
        beta2_scaling: ``"half-life"`` keeps the memory of Adam's second moment at so many samples:
            β₂ becomes β₂ to the power κ.
        weight_decay_scaling: ``"sqrt"`` multiplies weight decay by √κ.
        rewarmup: How long the learning rate takes to a new factor, in a straight line; None for at
            once.
        max_kappa: Cap on κ, because beyond the noise scale a larger batch wants no larger learning
            rate.
        weight: What a micro-batch weighs in its update (a function of the batch or its dotted name,
            or the name of an ids or mask field), which makes the gradient the mean over tokens;
            None for its samples. The training step must return the mean over the same, and a
            finite one for a batch that weighs nothing. A window that weighs nothing gets a
            gradient of zero.
        micro_batch_size: Samples in a batch of one process, where the loader has no
            ``batch_size``; None to ask the loader.
        max_micro_batch_size: The most samples that a process may put through the model at a time:
            a cap on a :class:`GlobalBatchLoader`'s micro-batch; a larger batch of your own loader
            raises. None for no cap.
        budget: An explicit budget such as ``"2e6 samples"`` that ends the training; None for the
            Trainer's limits.
        samples: Counts the samples in a batch (a function or a field's name); None for the
            loader's batch size.
        tokens: Counts the tokens in a batch (a function, or the name of an ids or mask field).

    Raises:
        ValueError: At fit start with ``accumulate_grad_batches`` other than 1,
            GradientAccumulationScheduler, StochasticWeightAveraging, DeepSpeed, manual
            optimization or ``dataloader_iter``; at train start for a global batch that is no
            multiple of micro-batch × processes.

    Tags:
        ``batch/planned_size`` and, with ``lr_scaling``, ``batch/lr_factor``.

    State:
        ``clock``: what has been consumed; ``window``: length and first batch of the window under
        way (a checkpoint inside a window loses its open gradients, and says so on resume);
        ``size``: the batch in force; ``coupling``: the first batch and the base values;
        ``weights``: the unit of weights.

    Example:
        >>> from lightning_bigopt import BatchSizeScheduler, BatchSizeSteps
        >>> BatchSizeScheduler(BatchSizeSteps({"0%": 32, "50%": 64}), lr_scaling="sqrt")
        BatchSizeScheduler(BatchSizeSteps(...))
    """

    controller: BatchSizeController

    def __init__(
        self,
        policy: BatchSizePolicy,
        *,
        lr_scaling: ScalingRule | None = None,
        beta2_scaling: Literal["half-life"] | None = None,
        weight_decay_scaling: Literal["sqrt"] | None = None,
        rewarmup: DurationLike | None = None,
        max_kappa: float | None = None,
        weight: BatchWeight = None,
        micro_batch_size: int | None = None,
        max_micro_batch_size: int | None = None,
        budget: str | None = None,
        samples: BatchCount = None,
        tokens: BatchCount = None,
    ) -> None:
        coupling = BatchCoupling(
            lr_scaling=lr_scaling,
            beta2_scaling=beta2_scaling,
            weight_decay_scaling=weight_decay_scaling,
            rewarmup=rewarmup,
            max_kappa=max_kappa,
        )
        settings = ClockSettings(budget=budget, samples=samples, tokens=tokens)
        super().__init__(
            BatchSizeController(
                policy,
                coupling=coupling,
                weight=weight,
                micro_batch_size=micro_batch_size,
                max_micro_batch_size=max_micro_batch_size,
                settings=settings,
            )
        )

    def __repr__(self) -> str:
        return f"BatchSizeScheduler({type(self.controller.policy).__name__}(...))"
