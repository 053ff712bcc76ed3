"""Checks for settings that conflict with StepGuard, before the first batch."""

from __future__ import annotations

from lightning_bigopt.engine.stage import LEARNING_RATE, Fit
from lightning_bigopt.optimizers.private import check_not_private
from lightning_bigopt.trainer_access import strategies

__all__ = ["check_conflicts"]


def check_conflicts(fit: Fit, *, has_backoffs: bool) -> None:
    """Raises for a strategy or an optimizer whose step cannot be skipped, and for a Backoff alone.

    Args:
        fit: The fit.
        has_backoffs: Whether an action lowers the learning rate.

    Raises:
        ValueError: With DeepSpeed, with an optimizer of Opacus, or for a Backoff without a
            LearningRateScheduler.
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
    if has_backoffs and LEARNING_RATE not in fit.owners():
        raise ValueError(
            "callbacks must contain a LearningRateScheduler with Backoff, got none; add "
            "LearningRateScheduler(Constant())"
        )
