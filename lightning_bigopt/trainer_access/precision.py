"""Loss scaling under 16-mixed: the GradScaler, its scale, unscaling, and overflows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "gradient_scaler",
    "loss_scale",
    "loss_scale_tensor",
    "scaler_found_inf",
    "unscale_gradients_",
    "unscaled_loss",
]


def gradient_scaler(trainer: Trainer) -> torch.amp.GradScaler | None:
    """Returns the GradScaler of 16-mixed; None for other precisions."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def unscale_gradients_(trainer: Trainer, optimizer: Optimizer) -> None:
    """Divides the gradients by the loss scale, unless Lightning has done so.

    Args:
        trainer: The Trainer.
        optimizer: The optimizer whose gradients are unscaled in place.
    """
    scaler = gradient_scaler(trainer)
    # Lightning unscales for all optimizers but fused ones, whose kernel divides by the scale.
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        scaler.unscale_(optimizer)


def scaler_found_inf(trainer: Trainer, optimizer: Optimizer) -> Tensor | None:
    """Returns the overflow flag of the last unscaling. Does not synchronize.

    Returns:
        A tensor of shape ``()``, positive after an overflow; None without a GradScaler.
    """
    scaler = gradient_scaler(trainer)
    if scaler is None:
        return None
    # torch has no public access to this flag; GradScaler.step reads it in the same way.
    flags = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    return next(iter(flags.values())) if flags else None


def unscaled_loss(trainer: Trainer, loss: Tensor) -> Tensor:
    """Computes the loss that ``training_step`` returned from the one in ``on_before_backward``.

    Lightning divides the loss by the accumulation, and the GradScaler multiplies it by its scale.
    Does not synchronize.

    Args:
        trainer: The Trainer.
        loss: The loss in ``on_before_backward``, of shape ``()``.

    Returns:
        The loss of the micro-batch, float32 of shape ``()``.
    """
    unscaled = loss.detach().float()
    scale = loss_scale_tensor(trainer)
    if isinstance(scale, Tensor):
        unscaled = unscaled / scale
    if trainer.lightning_module.automatic_optimization:
        unscaled = unscaled * int(trainer.accumulate_grad_batches)
    return unscaled


def loss_scale(trainer: Trainer) -> float:
    """Returns the factor by which the GradScaler multiplies losses; 1.0 without a GradScaler."""
    scaler = gradient_scaler(trainer)
    return 1.0 if scaler is None else float(scaler.get_scale())


def loss_scale_tensor(trainer: Trainer) -> Tensor | float:
    """Returns the factor of :func:`loss_scale` without synchronizing: a tensor, or 1.0.

    With a GradScaler it is 1.0 until the first loss is scaled.
    """
    scaler = gradient_scaler(trainer)
    # The tensor itself, because the public get_scale() synchronizes.
    scale: Tensor | None = None if scaler is None else scaler._scale
    return 1.0 if scale is None else scale
