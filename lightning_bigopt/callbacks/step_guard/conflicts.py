"""Checks for settings that conflict with StepGuard, before the first batch."""

from __future__ import annotations

from lightning_bigopt.engine.stage import LEARNING_RATE, Fit
from lightning_bigopt.gradients.roll_back import RollBack
from lightning_bigopt.optimizers.names import unwrapped
from lightning_bigopt.optimizers.private import check_not_private
from lightning_bigopt.trainer_access import strategies
from lightning_bigopt.trainer_access.callbacks import find_lightning_callback

__all__ = ["check_conflicts"]


def check_conflicts(fit: Fit, *, has_backoffs: bool, roll_back: RollBack | None = None) -> None:
    """Raises for a strategy or an optimizer whose step cannot be skipped, and for a Backoff alone.

    Args:
        fit: The fit.
        has_backoffs: Whether an action lowers the learning rate.
        roll_back: The RollBack of the guard.

    Raises:
        ValueError: With DeepSpeed or an optimizer of Opacus; for a Backoff, or a RollBack that
            lowers the learning rate, without a LearningRateScheduler; for a RollBack with manual
            optimization, a ZeroRedundancyOptimizer, or a callback of Lightning that averages the
            weights.
    """
    trainer = fit.trainer
    if strategies.is_deepspeed(trainer):
        raise ValueError(
            "strategy must not be DeepSpeed with StepGuard, got "
            f"{type(trainer.strategy).__name__}, which runs the optimizer step itself; remove "
            "StepGuard"
        )
    check_not_private(
        trainer.optimizers,
        "StepGuard",
        "whose privacy accounting breaks if updates are skipped depending on their data; remove "
        "StepGuard",
    )
    if roll_back is not None:
        _check_roll_back(fit, roll_back)
    if has_backoffs and LEARNING_RATE not in fit.owners():
        raise ValueError(
            "callbacks must contain a LearningRateScheduler with Backoff, got none; add "
            "LearningRateScheduler(Constant())"
        )


def _check_roll_back(fit: Fit, roll_back: RollBack) -> None:
    trainer = fit.trainer
    if not fit.module.automatic_optimization:
        raise ValueError(
            "automatic_optimization must be True with RollBack, got manual optimization, whose "
            "accumulation windows are not known; remove roll_back"
        )
    for optimizer in map(unwrapped, trainer.optimizers):
        # By name, because the import compiles functions for a second, and warns.
        if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
            raise ValueError(
                "optimizer must not be a ZeroRedundancyOptimizer with RollBack, got one, whose "
                "state is spread over the processes; use FSDP2, or remove roll_back"
            )
    for kind in ("WeightAveraging", "StochasticWeightAveraging"):
        if (other := find_lightning_callback(trainer, kind)) is not None:
            raise ValueError(
                f"callbacks must not contain {type(other).__name__} with RollBack, got both: its "
                "average would keep the weights that were discarded; use ModelAveraging"
            )
    if roll_back.lr_factor < 1 and LEARNING_RATE not in fit.owners():
        raise ValueError(
            "callbacks must contain a LearningRateScheduler with RollBack(lr_factor=...), got "
            "none; add LearningRateScheduler(Constant()), or write lr_factor=1.0"
        )
