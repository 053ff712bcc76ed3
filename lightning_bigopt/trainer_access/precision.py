"""The GradScaler of 16-mixed: what it did to loss and gradients, and what it found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_bigopt.trainer_access.strategies import shard_group

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "comes_to_nothing",
    "gradient_scaler",
    "loss_scale",
    "scaler_found_inf",
    "unscale_gradients_",
    "unscaled_loss",
]


def gradient_scaler(trainer: Trainer) -> torch.amp.GradScaler | None:
    """The GradScaler of 16-mixed; None for other precisions."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def comes_to_nothing(
    trainer: Trainer, parameters: Sequence[tuple[str, nn.Parameter]], *, has_loss: bool
) -> bool:
    """Whether Lightning calls for an update without a gradient, or for one that it leaves out.

    ``training_step`` may return None. With a GradScaler, Lightning makes no update then, even where
    earlier micro-batches of the window left gradients, which are still scaled.

    Args:
        trainer: The Trainer.
        parameters: Those that the update would change.
        has_loss: Whether the batch under way gave a loss.
    """
    if gradient_scaler(trainer) is not None and trainer.lightning_module.automatic_optimization:
        return not has_loss
    if shard_group(trainer) is not None:
        return False  # this process may have no shard of any gradient
    return all(parameter.grad is None for _, parameter in parameters)


def unscale_gradients_(trainer: Trainer, optimizer: Optimizer) -> bool:
    """Undoes the loss scale where Lightning left it to a fused optimiser.

    Returns:
        Whether a GradScaler is at work, whose own check will skip non-finite gradients.
    """
    scaler = gradient_scaler(trainer)
    if scaler is None:
        return False
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        scaler.unscale_(optimizer)
    return True


def scaler_found_inf(trainer: Trainer, optimizer: Optimizer) -> Tensor | None:
    """What the GradScaler's unscaling found: 0-d, positive for an overflow; None without one."""
    scaler = gradient_scaler(trainer)
    if scaler is None:
        return None
    found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    return next(iter(found.values())) if found else None


def unscaled_loss(trainer: Trainer, loss: Tensor) -> Tensor:
    """A micro-batch's loss as the training step returned it, out of what is differentiated.

    Lightning divides it by the accumulation, a GradScaler multiplies it by its scale. Does not
    synchronise.
    """
    plain = loss.detach().float()
    scaler = gradient_scaler(trainer)
    if scaler is not None and scaler._scale is not None:
        plain = plain / scaler._scale
    if trainer.lightning_module.automatic_optimization:
        plain = plain * int(trainer.accumulate_grad_batches)
    return plain


def loss_scale(trainer: Trainer) -> float:
    """What the GradScaler multiplies losses by; 1.0 without one."""
    scaler = gradient_scaler(trainer)
    return 1.0 if scaler is None else float(scaler.get_scale())
