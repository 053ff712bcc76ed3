"""Loads checkpoints whose optimizer states are tensor subclasses, such as quantized tensors."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from lightning_bigopt.trainer_access.packages import classes

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.plugins import CheckpointIO

__all__ = ["accept_subclasses", "restore_loading"]

_LOAD = "load_checkpoint"


def accept_subclasses(trainer: Trainer) -> None:
    """Lets the Trainer load checkpoints with tensor subclasses; call it in ``setup``.

    Lightning passes ``map_location=lambda storage, location: storage`` to ``torch.load``. torch
    raises for a function as soon as the checkpoint contains a tensor subclass such as the states of
    torchao's optimizers. ``"cpu"`` means the same and works. A CheckpointIO whose class overrides
    ``load_checkpoint`` is left unchanged.

    Args:
        trainer: The Trainer, before it loads a checkpoint.
    """
    plugin = _innermost(trainer)
    kinds = classes("plugins.TorchCheckpointIO")
    if any(type(plugin).load_checkpoint is kind.load_checkpoint for kind in kinds):
        # An instance attribute shadows the method, and deleting it undoes the change.
        vars(plugin)[_LOAD] = partial(_load, plugin)


def restore_loading(trainer: Trainer) -> None:
    """Undoes :func:`accept_subclasses`."""
    vars(_innermost(trainer)).pop(_LOAD, None)


def _innermost(trainer: Trainer) -> Any:
    """Returns the plugin that reads files; AsyncCheckpointIO contains another plugin."""
    plugin: Any = trainer.strategy.checkpoint_io
    while (inner := getattr(plugin, "checkpoint_io", None)) is not None:
        plugin = inner
    return plugin


def _load(plugin: CheckpointIO, path: Any, **options: Any) -> Any:
    read = partial(type(plugin).load_checkpoint, plugin, path, **{"map_location": "cpu", **options})
    try:
        return read()
    except UnpicklingError as error:
        # torchao allows its classes for weights_only=True when it is imported. A module that
        # imports it in configure_optimizers has not done so yet.
        if "torchao.optim" not in str(error) or find_spec("torchao") is None:
            raise
    import_module("torchao.optim")
    return read()
