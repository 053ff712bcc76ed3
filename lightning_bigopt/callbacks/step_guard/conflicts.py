"""Checks that the updates of a Trainer can be skipped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_bigopt.optimizers.names import is_opacus_optimizer
from lightning_bigopt.trainer_access import strategies

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["check_conflicts"]


def check_conflicts(trainer: Trainer) -> None:
    """Raises for a strategy or an optimizer whose step cannot be skipped.

    Raises:
        ValueError: With DeepSpeed or an optimizer of Opacus.
    """
    if strategies.is_deepspeed(trainer):
        raise ValueError(
            "strategy must not be DeepSpeed with StepGuard, got "
            f"{type(trainer.strategy).__name__}, which steps itself; remove StepGuard"
        )
    for optimizer in trainer.optimizers:
        if is_opacus_optimizer(optimizer):
            raise ValueError(
                "optimizer must not be an optimizer of Opacus with StepGuard, got "
                f"{type(optimizer).__name__}: skipping updates depending on their data breaks "
                "the privacy accounting; remove StepGuard"
            )
