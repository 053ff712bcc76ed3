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

__all__ = ["StoredTraining", "localized", "sharded_like", "training_state"]


def training_state(
    module: nn.Module, optimizers: Sequence[Optimizer], copies: ObjectSnapshot
) -> dict[str, Any]:
    """Returns weights, buffers and optimizer states as tensors in plain containers.

    Args:
        module: The module.
        optimizers: Its optimizers.
        copies: Copies of their tensors, which the result shares.

    Returns:
        ``weights``: the local shards of parameters and buffers by name; ``optimizers``: the
        ``state_dict`` of each optimizer, with local shards.
    """
    found = copies.contents()
    weights = _tensors(module)
    return {
        "weights": {n: _local_copy(t, found) for n, t in weights.items() if not is_lazy(t)},
        "optimizers": [_copied(optimizer.state_dict(), found) for optimizer in optimizers],
    }


class StoredTraining:
    """The result of :func:`training_state`, which can be restored in another process.

    Weights and buffers are restored in place. The states of optimizers are loaded as from a
    checkpoint.

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
        self._module, self._optimizers, self._state = module, list(optimizers), state

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
        weights, saved = _tensors(self._module), self._state["weights"]
        for name, content in saved.items():
            found = None if name not in weights else tuple(_local(weights[name]).shape)
            if found != tuple(content.shape):
                raise ValueError(
                    f"the module must have a tensor {name} of shape {tuple(content.shape)} on this "
                    f"process, as in the saved snapshot, got {found}; resume with the same model"
                )
        for name, content in saved.items():
            _local(weights[name]).copy_(content)
        for optimizer, state in zip(self._optimizers, self._state["optimizers"], strict=True):
            # Copied, because torch uses the tensors themselves, and training would change them.
            optimizer.load_state_dict(sharded_like(copied(state), optimizer.state_dict()))


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
