"""Reads gradient norm and loss of an update, equal on all processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_bigopt.callbacks.step_guard.rejection_report import WindowRecorder
from lightning_bigopt.engine.update import Update
from lightning_bigopt.gradients.guard import Quantity
from lightning_bigopt.gradients.norm_kernels import accumulation_dtype
from lightning_bigopt.trainer_access import precision

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["read"]


def read(
    trainer: Trainer, update: Update, window: WindowRecorder, *, reads_loss: bool
) -> dict[Quantity, float] | None:
    """Returns norm and loss of an update; None after an overflow of the GradScaler.

    One all-reduce and one transfer to the host.

    Args:
        trainer: The Trainer.
        update: The update.
        window: The losses of its window.
        reads_loss: Whether the loss is read.
    """
    total = update.norms.total
    like = total.new_zeros((), dtype=accumulation_dtype(total.device))
    overflow = like
    if update.scaler_skips_overflow:
        flag = precision.scaler_found_inf(trainer, update.optimizer)
        overflow = like if flag is None else flag.to(like)
    numbers = [total.to(like), overflow]
    if reads_loss:
        numbers += window.weighted_loss(like)
    # The decision is made on the mean of the norms of all processes, so that it is the same
    # everywhere. Clipping reads the norm of this process, which is another one if the processes
    # keep their own gradients (local SGD).
    summed = trainer.strategy.reduce(torch.stack(numbers), reduce_op="sum")
    own, *sums = torch.cat([numbers[0].view(1), summed]).tolist()
    norm, overflows, *loss = (number / trainer.world_size for number in sums)
    if overflows > 0:
        return None
    update.norms.take_value(own)
    readings: dict[Quantity, float] = {"norm": norm}
    if loss and loss[1] != 0:
        readings["loss"] = loss[0] / loss[1]
    return readings
