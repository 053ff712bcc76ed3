"""The tensors of averages in checkpoints: in the state of the callback, or as shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_bigopt.averaging.average import AverageState
from lightning_bigopt.averaging.weights import Weights
from lightning_bigopt.callbacks.averaging.averaged_tensors import AveragedTensors
from lightning_bigopt.callbacks.averaging.running_averages import RunningAverages
from lightning_bigopt.trainer_access.saved_weights import (
    is_sharded,
    read_second_weights,
    with_second_weights,
)

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["SavedAverages"]

_OWNER = "ModelAveraging"


class SavedAverages:
    """Collects the tensors for a checkpoint, and restores them.

    Whole tensors are in the state of the callback. With FSDP2 all processes gather them when they
    collect the weights. A sharded checkpoint stores shards among its weights, under reserved names.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._collected: dict[str, Any] | None = None
        self._has_warned = False

    def clear(self) -> None:
        """Drops the tensors that were collected for a checkpoint."""
        self._collected = None

    # -------------------------------------------------------------------------------- saving

    def collect(
        self,
        state_dict: dict[str, Any],
        tensors: AveragedTensors,
        model: Mapping[str, Tensor] | None,
        *,
        training: Weights | None,
        states: Mapping[str, AverageState],
    ) -> dict[str, Any]:
        """Returns the weights of a checkpoint, and keeps the others for :meth:`state`.

        Args:
            state_dict: The weights of the module.
            tensors: The averaged tensors.
            model: The average to save as the model; None for the weights as they are.
            training: The training weights while the module has the average.
            states: The states of the averages.
        """
        sharded = is_sharded(state_dict)
        form = tensors.wrapped if sharded else tensors.whole
        copies = {name: [form(c) for c in state.copies] for name, state in states.items()}
        kept: dict[str, Tensor] = {}
        if model is not None:
            # Buffers of an open window are saved as they were at its start, as in state_dict.
            current = {key: state_dict[key] for key in tensors.local() if key in state_dict}
            self._warn_of_other_names(state_dict, current, tensors.local())
            kept = current if training is None else form(training)
            dtypes = {key: tensor.dtype for key, tensor in tensors.local().items()}
            cast = {key: value.to(dtypes[key]) for key, value in model.items()}
            saved = tensors.with_aliases(form(cast))
            state_dict = state_dict | {k: v for k, v in saved.items() if k in state_dict}
        if sharded:
            self._collected = {"training": None, "copies": {name: [] for name in copies}}
            for name, weights in _second_weights(kept, copies).items():
                state_dict = with_second_weights(state_dict, weights, owner=name)
        else:
            self._collected = {"training": kept or None, "copies": copies}
        return state_dict

    def _warn_of_other_names(
        self, state_dict: Mapping[str, Any], found: Mapping[str, Any], names: Mapping[str, Any]
    ) -> None:
        missing = [name for name in names if name not in found]
        if state_dict and missing and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"The state_dict of the module does not contain {missing[0]} under this name, so "
                "that checkpoints have its training weights instead of the average. Rename in "
                "on_save_checkpoint instead of state_dict."
            )

    def state(
        self,
        tensors: AveragedTensors | None,
        running: RunningAverages,
        training: Weights | None,
    ) -> dict[str, Any]:
        """Returns the state for a checkpoint: what was collected, or the tensors as they are."""
        if self._loaded is not None:
            return self._loaded  # not applied yet
        states, kinds = running.states, running.kinds
        collected, self._collected = self._collected, None
        if collected is None:
            # Shards cannot be gathered here: only one process may have called this.
            is_whole = tensors is None or not tensors.is_sharded
            copies = {name: state.copies if is_whole else [] for name, state in states.items()}
            collected = {"training": training if is_whole else None, "copies": copies}
        return {
            "averages": {
                name: {
                    "kind": kinds[name],
                    "numbers": dict(state.numbers),
                    "number_of_copies": len(state.copies),
                    "copies": list(collected["copies"][name]),
                }
                for name, state in states.items()
            },
            "training": collected["training"],
        }

    # ----------------------------------------------------------------------------- restoring

    @property
    def names(self) -> set[str]:
        """The names of the tensors that the checkpoint has averaged, for :meth:`restore`."""
        if self._loaded is None:
            return set()
        copies = [c for saved in self._loaded["averages"].values() for c in saved["copies"]]
        return {name for weights in (self._loaded["training"] or {}, *copies) for name in weights}

    @property
    def is_loaded(self) -> bool:
        """Whether the state of a checkpoint has not been applied yet."""
        return self._loaded is not None

    def load(self, state: Mapping[str, Any]) -> None:
        """Keeps the state of a checkpoint until :meth:`restore`."""
        self._loaded = {name: state[name] for name in ("averages", "training")}

    def restore(
        self,
        trainer: Trainer,
        tensors: AveragedTensors,
        running: RunningAverages,
    ) -> Weights | None:
        """Applies the state of a checkpoint.

        Args:
            trainer: The Trainer.
            tensors: The averaged tensors.
            running: The averages; the states of those in the checkpoint are filled in place.

        Returns:
            The training weights; None if the module has them.
        """
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return None
        for name, saved in loaded["averages"].items():
            if saved.get("kind") != running.kinds.get(name):
                continue  # another average of this name begins anew
            state = running.states[name]
            state.numbers = dict(saved["numbers"])
            state.copies = [running.convert(tensors.shards(copy)) for copy in saved["copies"]]
            if len(state.copies) < saved["number_of_copies"]:
                owners = [_owner(name, i) for i in range(saved["number_of_copies"])]
                shards = [self._read(trainer, tensors, owner, running.convert) for owner in owners]
                state.copies = [found for found in shards if found is not None]
                if len(state.copies) < len(owners):
                    state.copies, state.numbers = [], {}
        if loaded["training"] is not None:
            return tensors.shards(loaded["training"])
        return self._read(trainer, tensors, _owner("training"), dict)

    def _read(
        self,
        trainer: Trainer,
        tensors: AveragedTensors,
        owner: str,
        convert: Callable[[Mapping[str, Tensor]], Weights],
    ) -> Weights | None:
        """Reads shards of a sharded checkpoint; a collective."""
        if not tensors.is_sharded:
            return None
        into = convert(tensors.copies())
        wrapped = tensors.wrapped(into)
        if not read_second_weights(trainer, wrapped, owner=owner):
            return None
        local = {key: _local(value) for key, value in wrapped.items()}
        return {key: value.to(into[key].device) for key, value in local.items()}


def _second_weights(
    training: Mapping[str, Tensor], copies: Mapping[str, list[dict[str, Tensor]]]
) -> dict[str, Mapping[str, Tensor]]:
    named: dict[str, Mapping[str, Tensor]] = {_owner("training"): training} if training else {}
    for name, each in copies.items():
        named |= {_owner(name, index): copy for index, copy in enumerate(each)}
    return named


def _owner(name: str, index: int | None = None) -> str:
    return f"{_OWNER}.{name}" if index is None else f"{_OWNER}.{name}.{index}"


def _local(value: Tensor) -> Tensor:
    with torch.no_grad():
        return value.to_local() if hasattr(value, "to_local") else value
