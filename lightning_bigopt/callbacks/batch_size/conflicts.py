"""Checks for settings that conflict with BatchSizeScheduler, before the first batch."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_bigopt.batching.policies.batch_size_policy import BatchSizePolicy
from lightning_bigopt.batching.policies.fixed_batch import (
    ConstantBatchSize,
    FullBatch,
    SingleSample,
)
from lightning_bigopt.callbacks.batch_size.coupling import BatchCoupling
from lightning_bigopt.checks import check_count, shown
from lightning_bigopt.engine.stage import Fit
from lightning_bigopt.optimizers.private import check_not_private
from lightning_bigopt.trainer_access import callbacks as trainer_callbacks
from lightning_bigopt.trainer_access import strategies
from lightning_bigopt.type_checks import check_instance

__all__ = [
    "check_conflicts",
    "check_micro_batch_sizes",
    "check_policy",
    "check_scaling",
    "has_fractions",
]

_CONSTANT_POLICIES = (ConstantBatchSize, FullBatch, SingleSample)


def check_policy(policy: object) -> None:
    """Raises unless a value is a batch-size policy."""
    check_instance("policy", policy, BatchSizePolicy, hint=_example_of(policy))


def check_micro_batch_sizes(micro_batch_size: object, max_micro_batch_size: object) -> None:
    """Raises unless both sizes are None or positive ints."""
    sizes = {"micro_batch_size": micro_batch_size, "max_micro_batch_size": max_micro_batch_size}
    for name, size in sizes.items():
        if size is not None:
            check_count(name, size, of="samples", hint="write an int such as 256")


def has_fractions(policy: BatchSizePolicy) -> bool:
    """Returns whether a policy may have thresholds in fractions of the budget."""
    if policy.adaptive or isinstance(policy, _CONSTANT_POLICIES):
        return False
    return not policy.units or "fraction" in policy.units


def check_scaling(policy: BatchSizePolicy, coupling: BatchCoupling) -> None:
    """Raises if hyperparameters follow a batch size that is constant."""
    if coupling.is_active and isinstance(policy, _CONSTANT_POLICIES):
        raise ValueError(
            "policy must change the batch size with lr_scaling, beta2_scaling or "
            f"weight_decay_scaling, got {shown(policy)}, which is constant; remove the scaling"
        )


def check_conflicts(fit: Fit, policy: BatchSizePolicy) -> None:
    """Raises if anything else sets the accumulation, or the loop has no accumulation windows.

    Args:
        fit: The fit.
        policy: The policy of the global batch size.

    Raises:
        ValueError: For the first conflict found; the message says how to resolve it.
    """
    trainer, module = fit.trainer, fit.module
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            "accumulate_grad_batches must be 1 with BatchSizeScheduler, got "
            f"{trainer.accumulate_grad_batches}; set the global batch size in the policy instead"
        )
    for name, way_out in (
        ("GradientAccumulationScheduler", "remove GradientAccumulationScheduler"),
        ("StochasticWeightAveraging", "write ModelAveraging(TailMean(over='10%')) instead of it"),
    ):
        if trainer_callbacks.find_lightning_callback(trainer, name) is not None:
            raise ValueError(
                f"callbacks must not contain {name} with BatchSizeScheduler, got both; {way_out}"
            )
    if not module.automatic_optimization:
        raise ValueError(
            "automatic_optimization must be True with BatchSizeScheduler, got False; let "
            "Lightning optimize, or accumulate in your own training_step"
        )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise ValueError(
            "training_step must take a batch with BatchSizeScheduler, got one that takes "
            "dataloader_iter; write training_step(self, batch, batch_idx)"
        )
    if strategies.is_deepspeed(trainer):
        raise ValueError(
            "strategy must not be DeepSpeed with BatchSizeScheduler, got "
            f"{type(trainer.strategy).__name__}, which accumulates itself; set "
            "gradient_accumulation_steps in its config"
        )
    check_not_private(
        trainer.optimizers,
        "BatchSizeScheduler",
        "whose noise and privacy accounting are those of one batch size; set batch_size of the "
        "loader",
    )
    if "seconds" in policy.units:
        raise ValueError(
            "the thresholds of a batch-size policy must be in steps, epochs, samples, tokens or "
            f"percent, got a time in {policy}; write percent, which is a share of the time if the "
            "budget is a time"
        )
    if "tokens" in policy.units and fit.clock.settings.tokens is None:
        raise ValueError(
            f"tokens must be given for a policy with thresholds in tokens, got None for {policy}; "
            "pass tokens=a function of the batch, or the name of its ids or mask"
        )


def _example_of(value: object) -> str:
    """Returns advice for a value that is no policy: sizes by threshold, or a single size."""
    if isinstance(value, Mapping):
        return "write BatchSizeSteps({'0%': 32, '50%': 64})"
    return "try ConstantBatchSize(256)"
