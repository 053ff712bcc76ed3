"""The GradScaler of 16-mixed: what it did to loss and gradients, and what it found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "come_back_to_clipping",
    "gradient_scaler",
    "loss_scale",
    "pass_over_clipping",
    "scaler_found_inf",
    "unscale_gradients_",
    "unscaled_loss",
]


_CLIPPING = "_clip_gradients"


def gradient_scaler(trainer: Trainer) -> torch.amp.GradScaler | None:
    """The GradScaler of 16-mixed; None for other precisions."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def unscale_gradients_(trainer: Trainer, optimizer: Optimizer) -> None:
    """Undoes the loss scale where Lightning left it to a fused optimizer."""
    scaler = gradient_scaler(trainer)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        scaler.unscale_(optimizer)


def pass_over_clipping(trainer: Trainer) -> None:
    """Has Lightning pass over its own clipping while it fits, where there is nothing to clip.

    It calls the module's hook on every update, ``gradient_clip_val`` or not.
    """
    vars(trainer.precision_plugin)[_CLIPPING] = _clip_nothing


def come_back_to_clipping(trainer: Trainer) -> None:
    """Undoes :func:`pass_over_clipping`."""
    vars(trainer.precision_plugin).pop(_CLIPPING, None)


def _clip_nothing(*_: Any, **__: Any) -> None: ...


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
    synchronize.
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
