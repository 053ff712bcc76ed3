"""The error that ends a run after too many rejections in a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_bigopt.callbacks.step_guard.rejected_update import RejectedUpdate
from lightning_bigopt.gradients.sharding import to_local
from lightning_bigopt.parameters import plain_name
from lightning_bigopt.trainer_access import callbacks as trainer_callbacks

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["TooManyRejectionsError", "too_many_rejections"]

_MAX_NAMES = 5


class TooManyRejectionsError(RuntimeError):
    """StepGuard has rejected too many updates in a row, or cannot roll back; the run has diverged.

    ``Trainer.fit`` raises it on every process. A hyperparameter search catches it and prunes the
    trial::

        try:
            trainer.fit(module, loader)
        except TooManyRejectionsError as error:
            raise optuna.TrialPruned(str(error)) from error

    Example:
        >>> from lightning_bigopt import TooManyRejectionsError
        >>> issubclass(TooManyRejectionsError, RuntimeError)
        True
    """


def too_many_rejections(
    trainer: Trainer, rule: str, rejected: RejectedUpdate, checkpoint: str | None
) -> TooManyRejectionsError:
    """Creates the error that ends a run after too many rejections in a row.

    Args:
        trainer: The Trainer.
        rule: The rule that the run breaks.
        rejected: The last rejected update.
        checkpoint: Newest checkpoint before the first of them; None if there was none.

    Returns:
        The error.
    """
    # ModelCheckpoint may have deleted the file since. A newer one is as good after skips, which do
    # not change the weights.
    if checkpoint is not None and not trainer_callbacks.checkpoint_exists(checkpoint):
        checkpoint = trainer_callbacks.newest_checkpoint(trainer)
    hint = (
        "No checkpoint was saved before the bad updates; lower the learning rate, or save more "
        "often"
    )
    if checkpoint is not None:
        hint = (
            f"The last checkpoint before the bad updates is {checkpoint}; resume from it with a "
            "lower learning rate or other data"
        )
    spoiled = _tensors_with_nan(trainer.lightning_module)
    if spoiled:
        names = ", ".join(spoiled[:_MAX_NAMES]) + (", …" if len(spoiled) > _MAX_NAMES else "")
        hint = (
            f"{names} contains NaN, so that every update is rejected at any learning rate; find "
            "where the forward pass writes it"
        )
        if checkpoint is not None:
            hint += f", and resume from {checkpoint}, the last checkpoint before"
    return TooManyRejectionsError(f"{rule}, got: {rejected} {hint}")


def _tensors_with_nan(module: nn.Module) -> list[str]:
    """Returns the names of parameters and buffers that contain a NaN on this process."""
    # An infinity may be intended, as in a mask.
    return [
        plain_name(name)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        if not is_lazy(tensor) and bool(to_local(tensor.detach()).isnan().any())
    ]
