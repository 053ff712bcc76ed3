"""Checks for settings that conflict with StepGuard, before the first batch."""

from __future__ import annotations

from lightning_bigopt.engine.stage import LEARNING_RATE, Fit
from lightning_bigopt.gradients.roll_back import RollBack
from lightning_bigopt.optimizers.private import check_not_private
from lightning_bigopt.trainer_access import strategies

__all__ = ["check_conflicts"]


def check_conflicts(fit: Fit, *, has_backoffs: bool, roll_back: RollBack | None = None) -> None:
    """Raises for a strategy or an optimizer whose step cannot be skipped, and for a Backoff alone.

    Args:
        fit: The fit.
        has_backoffs: Whether an action lowers the learning rate.
        roll_back: The RollBack of the guard.

    Raises:
        ValueError: With DeepSpeed, with an optimizer of Opacus, for a Backoff, or a RollBack that
            lowers the learning rate, without a LearningRateScheduler, or for a RollBack with manual
            optimization.
    """
    trainer = fit.trainer
    if strategies.is_deepspeed(trainer):
        raise ValueError(
            "strategy must not be DeepSpeed with StepGuard, got "
            f"{type(trainer.strategy).__name__}, which steps itself; remove StepGuard"
        )
    check_not_private(
        trainer.optimizers,
        "StepGuard",
        "whose privacy accounting breaks if updates are skipped depending on their data; remove "
        "StepGuard",
    )
    if roll_back is not None and not fit.module.automatic_optimization:
        raise ValueError(
            "automatic_optimization must be True with RollBack, got manual optimization, whose "
            "accumulation windows are not known; remove roll_back"
        )
    lowers = roll_back is not None and roll_back.lr_factor < 1
    if lowers and LEARNING_RATE not in fit.owners():
        raise ValueError(
            "callbacks must contain a LearningRateScheduler with RollBack(lr_factor=...), got "
            "none; add LearningRateScheduler(Constant()), or write lr_factor=1.0"
        )
    if has_backoffs and LEARNING_RATE not in fit.owners():
        raise ValueError(
            "callbacks must contain a LearningRateScheduler with Backoff, got none; add "
            "LearningRateScheduler(Constant())"
        )
