"""What cannot be exact together with a planned batch, refused before the first batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_bigopt import trainer_access
from lightning_bigopt.batching import BatchSizePolicy

if TYPE_CHECKING:
    from lightning_bigopt.pipeline import Pipeline

__all__ = ["refuse_conflicts"]


def refuse_conflicts(pipeline: Pipeline, policy: BatchSizePolicy) -> None:
    """Refuses second owners of the accumulation, and loops without windows.

    Raises:
        ValueError: For the first conflict found, with the way out.
    """
    trainer, module = pipeline.trainer, pipeline.module
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            "accumulate_grad_batches must be 1 with BatchSizeScheduler, got "
            f"{trainer.accumulate_grad_batches}; name the global batch in the policy instead"
        )
    for kind in (GradientAccumulationScheduler, StochasticWeightAveraging):
        if any(isinstance(callback, kind) for callback in trainer_access.callbacks_of(trainer)):
            raise ValueError(
                f"callbacks must not hold {kind.__name__} with BatchSizeScheduler, got both; "
                f"remove {kind.__name__}"
            )
    if not module.automatic_optimization:
        raise ValueError(
            "automatic_optimization must be True with BatchSizeScheduler, got False; let "
            "Lightning optimize, or accumulate in your own training_step"
        )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise ValueError(
            "training_step must take a batch with BatchSizeScheduler, got one that takes "
            "dataloader_iter; take batch and batch_idx"
        )
    if trainer_access.is_deepspeed(trainer):
        raise ValueError(
            "strategy must not be DeepSpeed with BatchSizeScheduler, got "
            f"{type(trainer.strategy).__name__}: DeepSpeed accumulates by itself; set "
            "gradient_accumulation_steps in its config"
        )
    if "tokens" in policy.units and pipeline.clock.settings.tokens is None:
        raise ValueError(
            f"tokens must be given for a policy with thresholds in tokens, got None for {policy}; "
            "pass tokens=a function of the batch, or the name of its ids or mask"
        )
