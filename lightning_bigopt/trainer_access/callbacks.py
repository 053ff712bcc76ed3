"""The Trainer's list of callbacks, and the checkpoints that ModelCheckpoint saves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_bigopt.trainer_access.packages import classes

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

__all__ = [
    "accumulation_schedule",
    "callbacks_of",
    "checkpoint_descriptions",
    "checkpoint_exists",
    "find_callback",
    "find_lightning_callback",
    "first_checkpoint_callback",
    "newest_checkpoint",
]

CallbackT = TypeVar("CallbackT")


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Returns the Trainer's list of callbacks (not a copy), including those of the module."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    return callbacks


def find_callback(trainer: Trainer, kind: type[CallbackT]) -> CallbackT | None:
    """Returns the first callback of a class; None if there is none."""
    return next((c for c in callbacks_of(trainer) if isinstance(c, kind)), None)


def find_lightning_callback(trainer: Trainer, name: str) -> Any:
    """Returns the first callback of a class of Lightning, by its name; None if there is none."""
    kinds = classes(f"callbacks.{name}")
    return next((c for c in callbacks_of(trainer) if isinstance(c, kinds)), None)


def accumulation_schedule(trainer: Trainer) -> dict[int, int]:
    """Returns the accumulation of the Trainer from each epoch on, in ascending order from 0."""
    scheduler = find_lightning_callback(trainer, "GradientAccumulationScheduler")
    if scheduler is None:
        return {0: int(trainer.accumulate_grad_batches)}
    return dict(sorted(scheduler.scheduling.items()))


def first_checkpoint_callback(trainer: Trainer) -> int:
    """Returns the index of the first checkpoint callback, or the length of the list without one.

    Lightning moves these callbacks to the end of the list.
    """
    callbacks = callbacks_of(trainer)
    indices = (
        i
        for i, callback in enumerate(callbacks)
        if isinstance(callback, classes("callbacks.Checkpoint"))
    )
    return next(indices, len(callbacks))


def newest_checkpoint(trainer: Trainer) -> str | None:
    """Returns the path of the newest checkpoint: saved in this fit, or the one resumed from."""
    # The private fields, because the public best_model_path is not the newest, and
    # last_model_path is empty without save_last.
    saved = [
        (callback._last_global_step_saved, callback._last_checkpoint_saved)
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, classes("callbacks.ModelCheckpoint"))
        and callback._last_checkpoint_saved
    ]
    if saved:
        return str(max(saved)[1])
    return None if trainer.ckpt_path is None else str(trainer.ckpt_path)


def checkpoint_exists(path: str) -> bool:
    """Returns whether a checkpoint exists: a file or a folder of shards, local or remote."""
    return bool(get_filesystem(path).exists(path))


def checkpoint_descriptions(callbacks: Sequence[Callback]) -> tuple[str, ...]:
    """Describes each ModelCheckpoint in one line: when it saves, and the monitored metric."""
    lines = []
    for callback in callbacks:
        if isinstance(callback, classes("callbacks.ModelCheckpoint")):
            monitored = f" by {callback.monitor}" if callback.monitor else ""
            lines.append(f"{_interval(callback)}{monitored}")
    return tuple(lines)


def _interval(callback: ModelCheckpoint) -> str:
    if callback._every_n_train_steps:
        steps = callback._every_n_train_steps
        return "every update" if steps == 1 else f"every {steps} updates"
    if callback._train_time_interval is not None:
        return f"every {callback._train_time_interval}"
    epochs = callback.every_n_epochs
    return "every epoch" if epochs == 1 else f"every {epochs} epochs"
