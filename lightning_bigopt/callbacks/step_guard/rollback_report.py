"""Describes rollbacks, and logs the losses of the updates that they discard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lightning_bigopt.durations.duration import amount_of
from lightning_bigopt.trainer_access import loggers

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["RolledBack", "log_discarded"]


@dataclass(frozen=True, kw_only=True)
class RolledBack:
    """Description of one rollback.

    Args:
        update: The Trainer's ``global_step`` before the update that caused the rollback.
        to: The ``global_step`` of the snapshot.
        epoch: The epoch at that update.
        reason: Reason for the rollback.
        left_out: Amount of data from the snapshot to the end of that update.
        unit: ``"samples"`` over all processes, or ``"batches"`` of one process where samples are
            not counted.
        replayed: Whether that data is trained again.
        loss_before: Smoothed loss before the rollback; None if no update was accepted.
        loss_after: Mean loss of the first ``RollBack(updates=)`` accepted updates after the
            rollback; None until then.

    Example:
        >>> rolled_back = RolledBack(
        ...     update=210,
        ...     to=190,
        ...     epoch=0,
        ...     reason="the smoothed loss is 4.1, usually 2, above 2.3 for 10 updates",
        ...     left_out=672,
        ...     unit="samples",
        ...     loss_before=4.1,
        ... )
        >>> print(rolled_back)
        Update 210 (epoch 0) rolled back to update 190: the smoothed loss is 4.1, usually 2, above
        2.3 for 10 updates; 672 samples are left out.
    """

    update: int
    to: int
    epoch: int
    reason: str
    left_out: int
    unit: str
    replayed: bool = False
    loss_before: float | None = None
    loss_after: float | None = None

    def __str__(self) -> str:
        amount = amount_of(self.left_out, self.unit)
        verb = "is" if self.left_out == 1 else "are"
        what = "trained again" if self.replayed else "left out"
        return (
            f"Update {self.update} (epoch {self.epoch}) rolled back to update {self.to}: "
            f"{self.reason}; {amount} {verb} {what}."
        )

    def as_state(self) -> dict[str, Any]:
        """Returns the fields as plain numbers and strings."""
        return asdict(self)


def log_discarded(
    trainer: Trainer, losses: Sequence[tuple[int, float]], *, loggers_step: int
) -> None:
    """Logs the losses of discarded updates under their own tag, at the steps of these updates.

    Only TensorBoard accepts values at earlier steps in every setting; other loggers get the mean at
    the current step.

    Args:
        trainer: The Trainer.
        losses: Logger step and loss of each discarded update.
        loggers_step: The current step of the loggers.
    """
    if not losses or not trainer.is_global_zero:
        return
    writers = loggers.tensorboard_writers(trainer)
    tag = "rollback/discarded_loss"
    for logger in trainer.loggers:
        if logger in writers:
            writer, prefix = writers[logger]
            with loggers.failed_writes_warn(logger):
                for step, loss in losses:
                    writer.add_scalar(prefix + tag, loss, step)
        else:
            mean: Mapping[str, float] = {tag: sum(loss for _, loss in losses) / len(losses)}
            loggers.log_metrics(logger, mean, step=loggers_step)
