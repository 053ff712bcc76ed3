"""The Trainer's callbacks, and the checkpoints that some of them write."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import ModelCheckpoint

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer

__all__ = ["callbacks_of", "checkpoint_exists", "checkpoint_interval", "newest_checkpoint"]


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The Trainer's callbacks, those that a module brought included."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]  # set by a connector


def newest_checkpoint(trainer: Trainer) -> str | None:
    """The checkpoint written last in this fit, or else the one that it resumed from."""
    saved = [
        (callback._last_global_step_saved, callback._last_checkpoint_saved)
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint) and callback._last_checkpoint_saved
    ]
    if saved:
        return str(max(saved)[1])
    return None if trainer.ckpt_path is None else str(trainer.ckpt_path)


def checkpoint_exists(path: str) -> bool:
    """Whether a checkpoint, a file or a folder of shards, is still there; paths may be remote."""
    return bool(get_filesystem(path).exists(path))


def checkpoint_interval(callback: ModelCheckpoint) -> str:
    """When a ModelCheckpoint saves, in words."""
    if callback._every_n_train_steps:
        return f"every {callback._every_n_train_steps} updates"
    if callback._train_time_interval is not None:
        return f"every {callback._train_time_interval}"
    epochs = callback._every_n_epochs
    return "every epoch" if epochs == 1 else f"every {epochs} epochs"
