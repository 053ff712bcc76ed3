"""What a trial run changes, put back in place: tensors, containers and attributes."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

__all__ = ["Snapshot"]


class Snapshot:
    """Remembers attributes, what is in their containers, and the content of every tensor in them.

    Arrays of NumPy and generators of random numbers are put back too; of other objects only that
    they were there.

    Everything is restored in place, so that whoever holds a parameter, a state or a learning rate
    held as a tensor goes on holding it.

    Args:
        objects: Such as modules and optimizers.
        device: Where copies of tensors wait; None for where the tensors are.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> before, weight = layer.weight.tolist(), layer.weight
        >>> snapshot = Snapshot(layer)
        >>> _ = torch.nn.init.zeros_(layer.weight)
        >>> layer.extra = 1
        >>> snapshot.restore()
        >>> layer.weight.tolist() == before, layer.weight is weight, hasattr(layer, "extra")
        (True, True, False)
    """

    def __init__(self, *objects: object, device: str | None = None) -> None:
        self._device = device
        self._seen: dict[int, object] = {}  # keeps what it knows alive, so that ids stay its own
        self._undo: list[Callable[[], object]] = []
        for thing in objects:
            self._keep(vars(thing))

    def restore(self) -> None:
        """Puts everything back; may be called once."""
        while self._undo:
            self._undo.pop()()

    def _keep(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        if isinstance(value, Tensor):
            self._seen[id(value)] = value
            self._keep_tensor(value)
        elif isinstance(value, dict):
            self._seen[id(value)] = value
            self._keep_dict(value)
        elif isinstance(value, list):
            self._seen[id(value)] = value
            items = list(value)
            self._undo.append(lambda: value.__setitem__(slice(None), items))
            for item in items:
                self._keep(item)
        elif (undo := _undo_of(value)) is not None:
            self._seen[id(value)] = value
            self._undo.append(undo)
            if isinstance(value, deque | set):
                for item in list(value):
                    self._keep(item)

    def _keep_tensor(self, tensor: Tensor) -> None:
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            return
        content = tensor.detach().to(self._device or tensor.device, copy=True)
        gradient = tensor.grad if tensor.is_leaf else None

        def undo() -> None:
            with torch.no_grad():
                tensor.detach().copy_(content)
            if tensor.is_leaf:
                tensor.grad = gradient

        self._undo.append(undo)

    def _keep_dict(self, mapping: dict[Any, Any]) -> None:
        items = dict(mapping)

        def undo() -> None:
            mapping.clear()
            mapping.update(items)

        self._undo.append(undo)
        for item in items.values():
            self._keep(item)


def _undo_of(value: Any) -> Callable[[], object] | None:
    """How to put back what a queue, a set, an array or a generator is now; None for the rest."""
    undo: Callable[[], object] | None = None
    numpy = sys.modules.get("numpy")  # what holds an array has imported it
    if isinstance(value, deque | set):
        undo = partial(_refill, value, list(value))
    elif isinstance(value, torch.Generator):
        undo = partial(value.set_state, value.get_state())
    elif isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        undo = partial(value.setstate, value.getstate())
    elif numpy is None:
        pass
    elif isinstance(value, numpy.ndarray) and value.flags.writeable:
        undo = partial(numpy.copyto, value, value.copy())
    elif isinstance(value, numpy.random.Generator):
        undo = partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    elif isinstance(value, numpy.random.RandomState):
        undo = partial(value.set_state, value.get_state())
    return undo


def _refill(value: deque[Any] | set[Any], items: list[Any]) -> None:
    value.clear()
    (value.extend if isinstance(value, deque) else value.update)(items)
