"""Replaces what a checkpoint stores as the model and its optimizers; stores second weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_bigopt.trainer_access import strategies

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import Strategy

__all__ = [
    "Collect",
    "collect_weights",
    "is_sharded",
    "load_weights_",
    "read_second_weights",
    "replace_saved_weights",
    "restore_saved_weights",
    "with_second_weights",
]

_WEIGHTS, _OPTIMIZER = "lightning_module_state_dict", "optimizer_state"
_MODEL = "state_dict"  # the part of a sharded checkpoint that holds the model

Collect: TypeAlias = Callable[[], dict[str, Any]]
"""Collects the state of the model or of one optimizer."""


def replace_saved_weights(
    trainer: Trainer,
    change: Callable[[Collect], dict[str, Any]],
    change_optimizer: Callable[[Optimizer, Collect], dict[str, Any]],
) -> None:
    """Replaces the functions that collect weights and optimizer states for a checkpoint.

    Every checkpoint (full, weights-only or sharded) collects its weights through the public method
    ``Strategy.lightning_module_state_dict``, and then the state of each optimizer, if it has them,
    through ``Strategy.optimizer_state``.

    Args:
        trainer: The Trainer, after ``strategy.setup``.
        change: Function that receives the original function that collects the weights, and returns
            the state dict to save.
        change_optimizer: The same for the state of an optimizer, which it also receives.
    """
    # An instance attribute shadows the method of the class, and deleting it undoes the change. The
    # hook on_save_checkpoint would come too late: Lightning has collected the weights by then, and
    # a sharded strategy may save them separately. A partial can be copied with the Trainer.
    strategy = trainer.strategy
    vars(strategy)[_WEIGHTS] = partial(_collect, strategy, change)
    vars(strategy)[_OPTIMIZER] = partial(_collect_optimizer, strategy, change_optimizer)


def restore_saved_weights(trainer: Trainer) -> None:
    """Undoes :func:`replace_saved_weights`."""
    for name in (_WEIGHTS, _OPTIMIZER):
        vars(trainer.strategy).pop(name, None)


def collect_weights(trainer: Trainer) -> dict[str, Any]:
    """Returns the weights as they are, without :func:`replace_saved_weights`."""
    return _original(trainer.strategy, _WEIGHTS)()


def _collect(strategy: Strategy, change: Callable[[Collect], dict[str, Any]]) -> dict[str, Any]:
    return change(_original(strategy, _WEIGHTS))


def _collect_optimizer(
    strategy: Strategy,
    change: Callable[[Optimizer, Collect], dict[str, Any]],
    optimizer: Optimizer,
) -> dict[str, Any]:
    return change(optimizer, partial(_original(strategy, _OPTIMIZER), optimizer))


def _original(strategy: Strategy, name: str) -> Callable[..., dict[str, Any]]:
    # Looked up on the class: on the instance this name is the replacement.
    return partial(getattr(type(strategy), name), strategy)


def load_weights_(trainer: Trainer, weights: Mapping[str, Any]) -> None:
    """Loads some of the weights; the others stay as they are.

    Args:
        trainer: The Trainer, while it fits.
        weights: Weights by their names in the checkpoint: whole tensors on every process, or
            DTensors.
    """
    strategy = trainer.strategy
    if not strategies.shards_gradients(trainer):
        strategy.load_model_state_dict({_MODEL: dict(weights)}, strict=False)
        return
    # There this method does nothing, because these strategies load when they read the file.
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    assert strategy.model is not None  # set before a fit
    options = StateDictOptions(full_state_dict=not is_sharded(weights), strict=False)
    set_model_state_dict(strategy.model, dict(weights), options=options)


# ---------------------------------------------------------------------- a second copy, as shards


def is_sharded(state_dict: Mapping[str, Any]) -> bool:
    """Returns whether the weights are shards, of which each process writes its own (FSDP2).

    A sharded checkpoint holds the state of callbacks of the first process only, so that the
    tensors of a capability must be stored with the weights by :func:`with_second_weights`. In a
    checkpoint in one file they belong to the state of the callback, because
    ``load_from_checkpoint`` refuses unknown weights.

    Args:
        state_dict: The weights, as ``saved_weights`` receives them.
    """
    return any(isinstance(value, DTensor) for value in state_dict.values())


def with_second_weights(
    state_dict: Mapping[str, Any], weights: Mapping[str, Tensor], *, owner: str
) -> dict[str, Any]:
    """Adds second weights to a sharded checkpoint, under reserved keys.

    They are written as shards. A Trainer without their owner loads only the keys of its module,
    and ignores them.

    Args:
        state_dict: The weights, as ``saved_weights`` receives them.
        weights: Tensors by the names of the parameters, DTensors for sharded ones.
        owner: A name for this copy.
    """
    return {**state_dict, **{_reserved(owner, name): value for name, value in weights.items()}}


def read_second_weights(trainer: Trainer, into: Mapping[str, Tensor], *, owner: str) -> bool:
    """Fills tensors from :func:`with_second_weights` of the checkpoint that the fit resumes from.

    A collective, for use in ``start``.

    Args:
        trainer: The Trainer.
        into: Tensors by the names of the parameters, filled in place; DTensors for sharded ones.
        owner: The name under which they were added.

    Returns:
        Whether the checkpoint is sharded and holds all of them.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader  # 60 ms
    from torch.distributed.checkpoint.state_dict_loader import load

    path: Any = trainer.strategy.broadcast(trainer.ckpt_path)
    if path is None or not Path(path).is_dir():
        return False
    wanted = {_reserved(owner, name): tensor for name, tensor in into.items()}
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    if not all(f"{_MODEL}.{key}" in stored for key in wanted):
        return False
    load({_MODEL: wanted}, checkpoint_id=path)
    return True


def _reserved(owner: str, name: str) -> str:
    return f"lightning_bigopt.{owner}.{name}"
