"""The counters of the fit loop: epochs, batches and updates, saved and restored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_bigopt.batching.window_length import WindowLength
from lightning_bigopt.trainer_access.loop import batches_that_stepped

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["counters", "restore_counters", "set_logger_step"]


def counters(trainer: Trainer) -> dict[str, Any]:
    """Returns the fit loop's counters of epochs, batches and updates, and the accumulation.

    Plain numbers in dictionaries and lists.
    """
    length = trainer.accumulate_grad_batches
    return {
        "accumulate": [int(length), getattr(length, "start", None)],
        "stepped": batches_that_stepped(trainer),
        **{name: tracker.state_dict() for name, tracker in _trackers(trainer).items()},
    }


def restore_counters(trainer: Trainer, state: dict[str, Any], *, position: bool = True) -> None:
    """Restores the counters from the result of :func:`counters`.

    Args:
        trainer: The Trainer.
        state: The counters.
        position: Whether the position in the data goes back, too: the epoch, the batches of the
            current epoch, and the accumulation window. Otherwise only the counts of the run do.
    """
    trackers = _trackers(trainer)
    set_logger_step(trainer, state["stepped"])
    for name in ("updates", "manual updates"):
        trackers[name].load_state_dict(state[name])
    batches = trackers["batches"]
    if position:
        length, start = state["accumulate"]
        trainer.accumulate_grad_batches = length if start is None else WindowLength(length, start)
        trackers["epochs"].load_state_dict(state["epochs"])
        batches.load_state_dict(state["batches"])
    else:
        batches.load_state_dict({**batches.state_dict(), "total": state["batches"]["total"]})


def set_logger_step(trainer: Trainer, step: int) -> None:
    """Sets the step at which Lightning logs the training metrics of the current update."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def _trackers(trainer: Trainer) -> dict[str, Any]:
    epoch_loop = trainer.fit_loop.epoch_loop
    return {
        "epochs": trainer.fit_loop.epoch_progress,
        "batches": epoch_loop.batch_progress,
        "updates": epoch_loop.automatic_optimization.optim_progress,
        "manual updates": epoch_loop.manual_optimization.optim_step_progress,
    }
