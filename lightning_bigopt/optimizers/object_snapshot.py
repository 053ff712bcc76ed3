"""Saves and restores the attributes of objects in place: tensors, containers and generators."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.optim import Optimizer

__all__ = ["ObjectSnapshot", "copied", "copy_to"]


class ObjectSnapshot:
    """Saves the attributes of objects and, recursively, the items of their containers.

    The contents of tensors and NumPy arrays and the states of random generators are copied, those
    of DTensors as local shards. Optimizers within the objects, as in a wrapper, are saved, too. Any
    other value is saved by reference. Everything is restored in place: parameters, optimizer states
    and learning-rate tensors stay the same objects, so that references to them remain valid.

    Args:
        objects: The objects, such as modules and optimizers, or lists of tensors.
        device: Device of the copies of tensors; None for the device of each tensor.
        asynchronous: Whether copies from a GPU to ``"cpu"`` go to pinned memory while training
            continues; they are complete when the current CUDA stream is.
        gradients: Whether gradients are saved and restored.
        nested: Whether the attributes of other objects within the objects are saved, too, if such
            an object has an attribute that is a tensor, or ``param_groups``. Modules are not.
        ignore: Returns whether an attribute, by its name, is neither saved nor restored.

    Attributes:
        attributes: The ``__dict__`` of every object that was saved.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> before, weight = layer.weight.tolist(), layer.weight
        >>> snapshot = ObjectSnapshot(layer)
        >>> _ = torch.nn.init.zeros_(layer.weight)
        >>> layer.extra = 1
        >>> snapshot.restore()
        >>> layer.weight.tolist() == before, layer.weight is weight, hasattr(layer, "extra")
        (True, True, False)
    """

    def __init__(
        self,
        *objects: object,
        device: str | None = None,
        asynchronous: bool = False,
        gradients: bool = True,
        nested: bool = False,
        ignore: Callable[[str], bool] = lambda name: not name,
    ) -> None:
        self._device, self._asynchronous = device, asynchronous
        self._saves_gradients = gradients
        self._saves_nested, self._ignores = nested, ignore
        # By id, because dicts and lists are not hashable. The references keep the objects alive:
        # Python may give the id of a deleted object to a new one.
        self._seen: dict[int, object] = {}
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._undo: list[Callable[[], object]] = []
        self.attributes: list[dict[str, Any]] = []
        for item in objects:
            if isinstance(item, list):
                self._save(item)
            else:
                self._save_attributes(vars(item))

    def contents(self) -> dict[int, Tensor]:
        """Returns the copies by the id of the tensor that they are copies of."""
        return {id(tensor): content for tensor, content in self._tensors}

    def check(self) -> None:
        """Checks that every tensor can be restored.

        Raises:
            ValueError: If a tensor has another shape, dtype or layout than when it was saved.
        """
        for tensor, content in self._tensors:
            current = _local(tensor)
            if _kind(current) != _kind(content):
                raise ValueError(
                    f"a tensor must keep its shape and dtype until it is restored, got "
                    f"{_kind(current)} instead of {_kind(content)}; replace the parameter instead "
                    "of its .data, or do it before the snapshot"
                )

    def restore(self) -> None:
        """Restores everything that was saved; may be called several times.

        Raises:
            ValueError: If :meth:`check` does. Nothing is changed then.
        """
        self.check()
        for undo in reversed(self._undo):
            undo()

    def _save(self, value: Any) -> None:
        if id(value) in self._seen:  # shared objects, and cycles such as parent modules
            return
        if isinstance(value, Tensor):
            self._seen[id(value)] = value
            self._save_tensor(value)
        elif isinstance(value, dict):
            self._seen[id(value)] = value
            self._save_dict(value)
        elif (undo := _undo_of(value)) is not None:
            self._seen[id(value)] = value
            self._undo.append(undo)
        if isinstance(value, list | tuple | deque | set):
            for item in list(value):
                self._save(item)
        elif isinstance(value, Optimizer) or (self._saves_nested and _has_tensors(value)):
            self._save_attributes(vars(value))

    def _save_attributes(self, attributes: dict[str, Any]) -> None:
        if id(attributes) in self._seen:
            return
        self._seen[id(attributes)] = attributes
        self.attributes.append(attributes)
        items = {name: item for name, item in attributes.items() if not self._ignores(name)}

        def undo() -> None:
            for name in [name for name in attributes if not self._ignores(name)]:
                del attributes[name]
            attributes.update(items)

        self._undo.append(undo)
        for item in items.values():
            self._save(item)

    def _save_tensor(self, tensor: Tensor) -> None:
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            return  # the parameter of a lazy module has no content yet
        local = _local(tensor)
        if hasattr(local, "__tensor_flatten__"):
            # A tensor made of others, such as a quantized state: its copy may share their memory,
            # and copying into it may round.
            for name in local.__tensor_flatten__()[0]:
                self._save(getattr(local, name))
        else:
            content = copy_to(local, self._device, asynchronous=self._asynchronous)
            self._tensors.append((tensor, content))
            self._undo.append(partial(_copy, tensor, content))
        if not self._saves_gradients or not tensor.is_leaf:
            return
        gradient = tensor.grad
        self._undo.append(partial(setattr, tensor, "grad", gradient))
        self._save(gradient)

    def _save_dict(self, mapping: dict[Any, Any]) -> None:
        items = dict(mapping)

        def undo() -> None:
            mapping.clear()
            mapping.update(items)

        self._undo.append(undo)
        for item in items.values():
            self._save(item)


def _local(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def _kind(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f", {tensor.layout}"
    return f"{tuple(tensor.shape)} of {tensor.dtype}{layout}"


def _copy(tensor: Tensor, content: Tensor) -> None:
    # In place, so that optimizers and views still refer to the restored tensor.
    with torch.no_grad():
        _local(tensor).copy_(content)


def _has_tensors(value: Any) -> bool:
    """Returns whether an object other than a module has an attribute that training changes."""
    if isinstance(value, type | nn.Module | Tensor) or not hasattr(value, "__dict__"):
        return False
    attributes = vars(value)
    return "param_groups" in attributes or any(
        isinstance(item, Tensor) for item in attributes.values()
    )


def _undo_of(value: Any) -> Callable[[], object] | None:
    """Returns a function that restores a list, deque, set, array or generator; None for others."""
    undo: Callable[[], object] | None = None
    # Not imported here: NumPy is optional, and a process without it holds no arrays.
    numpy = sys.modules.get("numpy")
    if isinstance(value, list):
        undo = partial(value.__setitem__, slice(None), list(value))
    elif isinstance(value, deque | set):
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


def copied(value: Any, device: str | None = None, *, asynchronous: bool = False) -> Any:
    """Copies tensors and containers recursively; other objects are shared.

    Args:
        value: The value.
        device: Device of the copies of tensors other than DTensors; None for that of each tensor.
        asynchronous: As for :class:`ObjectSnapshot`.
    """
    copy = partial(copied, device=device, asynchronous=asynchronous)
    if isinstance(value, DTensor):
        return value.detach().clone()
    if isinstance(value, Tensor):
        return copy_to(value.detach(), device, asynchronous=asynchronous)
    if isinstance(value, Mapping):
        return {key: copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [copy(item) for item in value]
    if type(value) is tuple:
        return tuple(copy(item) for item in value)
    return value


def copy_to(tensor: Tensor, device: str | None, *, asynchronous: bool = False) -> Tensor:
    """Copies a tensor to a device; None for its own.

    Args:
        tensor: The tensor.
        device: The device.
        asynchronous: Whether a copy from a GPU to ``"cpu"`` goes to pinned memory, without waiting.
    """
    is_strided = tensor.layout == torch.strided
    if not (asynchronous and device == "cpu" and tensor.is_cuda and is_strided):
        return tensor.to(device or tensor.device, copy=True)
    content = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return content.copy_(tensor, non_blocking=True)
