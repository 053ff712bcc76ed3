"""Where the fit loop stands: in the epoch, in the accumulation window, on the loggers' axis."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import Timer

from lightning_bigopt.trainer_access.callbacks import callbacks_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "batches_that_stepped",
    "closes_window",
    "coming_step",
    "is_fast_dev_run",
    "is_last_batch",
    "is_unlimited",
    "ready_batches",
]


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Whether the Trainer only tries a batch or a few."""
    return bool(getattr(trainer, "fast_dev_run", False))


def is_unlimited(trainer: Trainer) -> bool:
    """Whether nothing limits the run, so that Lightning would make it 1000 epochs."""
    timed = any(isinstance(callback, Timer) for callback in callbacks_of(trainer))
    return trainer.fit_loop.max_epochs is None and trainer.max_steps == -1 and not timed


def ready_batches(trainer: Trainer) -> int:
    """Batches of this epoch that were fetched, the one being trained included."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)


def is_last_batch(trainer: Trainer) -> bool:
    """Whether the batch being trained is the last of its epoch (known before it is trained)."""
    return bool(trainer.fit_loop.epoch_loop._num_ready_batches_reached())


def closes_window(trainer: Trainer) -> bool:
    """Whether the batch being trained ends an accumulation window."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def batches_that_stepped(trainer: Trainer) -> int:
    """The x coordinate that Lightning gives to training metrics."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def coming_step(trainer: Trainer) -> int:
    """The same for the next update, from ``on_train_start`` on.

    A checkpoint holds the count of the update before: Lightning counts on only when it begins an
    epoch after it, by the rule that is repeated here.
    """
    loop = trainer.fit_loop.epoch_loop
    is_behind = (
        loop.restarting
        and not loop._should_accumulate()
        and (loop.restarted_on_train_batch_end or not loop.restarted_on_last)
    )
    return batches_that_stepped(trainer) + is_behind
