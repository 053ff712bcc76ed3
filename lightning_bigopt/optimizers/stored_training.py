"""Weights, buffers and optimizer states of this process as plain data, and restoring them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_bigopt.optimizers.object_snapshot import ObjectSnapshot, copied, copy_to

__all__ = [
    "StoredTraining",
    "derived_buffers",
    "is_of_one_step",
    "localized",
    "sharded_like",
    "training_state",
]

_OF_TORCH = frozenset({"state", "param_groups", "defaults"})
# Attributes of optimizers that a step sets and removes.
_OF_ONE_STEP = frozenset({"found_inf", "grad_scale", "step"})


def training_state(
    module: nn.Module, optimizers: Sequence[Optimizer], copies: ObjectSnapshot
) -> dict[str, Any]:
    """Returns weights, buffers and optimizer states as tensors in plain containers.

    Args:
        module: The module.
        optimizers: Its optimizers; those that they wrap are included.
        copies: Copies of their tensors, which the result shares.

    Returns:
        ``weights``: the local shards of parameters and buffers by name; ``optimizers``: the
        ``state_dict`` of each optimizer, with local shards; ``attributes``: the attributes of each
        optimizer that are plain data.
    """
    found, optimizers = copies.contents(), _with_wrapped(optimizers)
    weights = _tensors(module)
    return {
        "weights": {n: _local_copy(t, found) for n, t in weights.items() if not is_lazy(t)},
        "optimizers": [_copied(optimizer.state_dict(), found) for optimizer in optimizers],
        "attributes": [
            {name: _copied(value, found) for name, value in _own_attributes(optimizer).items()}
            for optimizer in optimizers
        ],
    }


class StoredTraining:
    """The result of :func:`training_state`, which can be restored in another process.

    Tensors are restored in place, with the data types that they had. Non-persistent buffers whose
    shape has changed, such as caches, stay, and so do parameter groups that were added, with empty
    states. An optimizer with a ``load_state_dict`` of its own loads its state itself.

    Args:
        module: The module.
        optimizers: Its optimizers.
        state: The state.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> before = layer.weight.tolist()
        >>> copies = ObjectSnapshot([*layer.parameters()], optimizer, device="cpu")
        >>> stored = StoredTraining(layer, [optimizer], training_state(layer, [optimizer], copies))
        >>> _ = nn.init.zeros_(layer.weight)
        >>> stored.restore()
        >>> layer.weight.tolist() == before
        True
    """

    def __init__(
        self, module: nn.Module, optimizers: Sequence[Optimizer], state: Mapping[str, Any]
    ) -> None:
        self._module, self._optimizers, self._state = module, _with_wrapped(optimizers), state

    def state_dict(self) -> dict[str, Any]:
        """Returns the state."""
        return dict(self._state)

    @torch.no_grad()
    def restore(self) -> None:
        """Restores the state; may be called several times.

        Raises:
            ValueError: If the module lacks a tensor, or has one of another shape. Nothing is
                changed then.
        """
        weights, saved = _tensors(self._module), dict(self._state["weights"])
        for name in derived_buffers(self._module) & saved.keys():
            if _local(weights[name]).shape != saved[name].shape:
                del saved[name]
        for name, content in saved.items():
            found = None if name not in weights else tuple(_local(weights[name]).shape)
            if found != tuple(content.shape):
                raise ValueError(
                    f"the module must have a tensor {name} of shape {tuple(content.shape)} on this "
                    f"process, as in the saved snapshot, got {found}; resume with the same model"
                )
        for optimizer, state in zip(self._optimizers, self._state["optimizers"], strict=True):
            _check_groups(optimizer, state)
        for name, content in saved.items():
            _local(weights[name]).copy_(content)
        for optimizer, state, attributes in zip(
            self._optimizers, self._state["optimizers"], self._state["attributes"], strict=True
        ):
            _restore_optimizer(optimizer, state)
            for name, value in attributes.items():
                setattr(optimizer, name, copied(value))


def _with_wrapped(optimizers: Sequence[Optimizer]) -> list[Optimizer]:
    """Returns the optimizers and those in their attributes, as of Lookahead."""
    found: list[Optimizer] = []
    for optimizer in optimizers:
        if all(optimizer is not other for other in found):
            inner = [value for value in vars(optimizer).values() if isinstance(value, Optimizer)]
            found += [optimizer, *_with_wrapped(inner)]
    return found


def derived_buffers(module: nn.Module) -> set[str]:
    """Returns the names of the buffers that the ``state_dict`` of the module does not contain."""
    saved = module.state_dict(keep_vars=True)
    return {name for name, _ in module.named_buffers() if name not in saved}


def _loads_itself(optimizer: Optimizer) -> bool:
    return type(optimizer).load_state_dict is not Optimizer.load_state_dict


def _check_groups(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Raises if the groups are not those of a saved state, except for added ones."""
    if _loads_itself(optimizer):
        return
    saved = [len(group["params"]) for group in state["param_groups"]]
    found = [len(group["params"]) for group in optimizer.param_groups]
    if found[: len(saved)] != saved:
        raise ValueError(
            f"the parameter groups of {type(optimizer).__name__} must have the numbers of "
            f"parameters {saved} of the saved snapshot, got {found}; resume with the same optimizer"
        )


def _restore_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    if _loads_itself(optimizer):
        # Copied, because the optimizer may use the tensors themselves.
        optimizer.load_state_dict(sharded_like(copied(saved), optimizer.state_dict()))
        return
    # Not by load_state_dict, which casts states to the data type of their parameter, and accepts no
    # added groups.
    for group in optimizer.param_groups[len(saved["param_groups"]) :]:
        for parameter in group["params"]:
            optimizer.state.pop(parameter, None)
    for group, options in zip(optimizer.param_groups, saved["param_groups"], strict=False):
        for parameter, index in zip(group["params"], options["params"], strict=True):
            state = optimizer.state[parameter]
            kept = saved["state"].get(index, {})
            restored = {k: _restored(v, state.get(k), parameter, k) for k, v in kept.items()}
            state.clear()
            state.update(restored)
            if not restored:
                del optimizer.state[parameter]
        for name, value in options.items():
            if name != "params":
                group[name] = _restored(value, group.get(name), None, name)


def _restored(value: Any, live: Any, parameter: Tensor | None, key: str) -> Any:
    """Returns a saved value, in the tensor that the optimizer has, if there is one."""
    if not isinstance(value, Tensor):
        return copied(value)
    if isinstance(live, Tensor):
        local = _local(live)
        if (local.shape, local.dtype) == (value.shape, value.dtype):
            local.copy_(value)
            return live
    if parameter is None:
        return copied(value)
    # The counts of updates stay on the CPU, as torch has them unless they are captured in graphs.
    is_count = key == "step" and not (isinstance(live, Tensor) and live.device.type != "cpu")
    content = value.to("cpu" if is_count else parameter.device, copy=True)
    return sharded_like(content, parameter) if value.shape == _local(parameter).shape else content


def _own_attributes(optimizer: Optimizer) -> dict[str, Any]:
    """Returns the attributes that are numbers, texts and tensors, or lists and dicts of them."""
    return {
        name: value
        for name, value in vars(optimizer).items()
        if name not in _OF_TORCH and not is_of_one_step(name) and _is_plain(value)
    }


def is_of_one_step(name: str) -> bool:
    """Returns whether an attribute of an optimizer is a hook, or belongs to one step."""
    return name in _OF_ONE_STEP or name.startswith("_bigopt") or name.endswith("_hooks")


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str | int) and _is_plain(item) for k, item in value.items())
    if type(value) in {list, tuple}:
        return all(map(_is_plain, value))
    return value is None or type(value) in {bool, int, float, str, Tensor}


def localized(value: Any) -> Any:
    """Returns a value with the local shards of its DTensors; containers are copied."""
    return _copied(value, None)


def sharded_like(value: Any, live: Any) -> Any:
    """Makes DTensors of the local shards where another value has DTensors; copies containers.

    Args:
        value: The result of :func:`localized`.
        live: A value with the same keys, as far as it has DTensors.
    """
    if isinstance(value, Tensor):
        if not isinstance(live, DTensor):
            return value
        return DTensor.from_local(
            value.to(live.device),
            live.device_mesh,
            live.placements,
            run_check=False,
            shape=live.shape,
            stride=live.stride(),
        )
    if isinstance(value, Mapping):
        others = live if isinstance(live, Mapping) else {}
        return {key: sharded_like(item, others.get(key)) for key, item in value.items()}
    if isinstance(value, list):
        same = isinstance(live, list) and len(live) == len(value)
        peers = live if same else [None] * len(value)
        return [sharded_like(item, peer) for item, peer in zip(value, peers, strict=True)]
    return value


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns all parameters and buffers by name, those that a checkpoint leaves out too."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _copied(value: Any, copies: Mapping[int, Tensor] | None) -> Any:
    if isinstance(value, Tensor):
        return _local(value) if copies is None else _local_copy(value, copies)
    if isinstance(value, Mapping):
        return {key: _copied(item, copies) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item, copies) for item in value]
    if type(value) is tuple:
        return tuple(_copied(item, copies) for item in value)
    return value


def _local_copy(tensor: Tensor, copies: Mapping[int, Tensor]) -> Tensor:
    content = copies.get(id(tensor))
    return copy_to(_local(tensor), "cpu", asynchronous=True) if content is None else content


def _local(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached
