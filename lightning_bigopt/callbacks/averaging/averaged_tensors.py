"""The parameters and buffers of a module that are averaged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parameter import is_lazy

from lightning_bigopt.averaging.weights import Weights
from lightning_bigopt.gradients.sharding import to_local

__all__ = ["AveragedTensors"]


class AveragedTensors:
    """The trainable parameters and the floating-point buffers of a module, by name.

    Names are those of the module's ``state_dict``. Frozen parameters do not change and are left
    out until they become trainable; buffers that the ``state_dict`` does not contain are left out.
    Sharded parameters (FSDP2) are represented by the shards of this process.

    Args:
        module: The module.
        buffers: Whether buffers are included.
    """

    def __init__(self, module: nn.Module, *, buffers: bool) -> None:
        self._module = module
        self._averages_buffers = buffers
        self._owners: dict[str, tuple[nn.Module, str]] = {}  # where the tensor is registered
        self._waiting: dict[str, nn.Parameter] = {}  # frozen or lazy parameters
        self._aliases: dict[str, list[str]] = {}  # further names of tied parameters
        self._sharding = [part for part in module.modules() if hasattr(part, "reshard")]
        self.find()

    def find(self) -> None:
        """Finds the tensors; the module may have been changed since the last call."""
        self._owners, self._waiting, self._aliases = {}, {}, {}
        saved = self._module.state_dict(keep_vars=True).keys() if self._averages_buffers else ()
        first: dict[int, str] = {}
        for prefix, part in self._module.named_modules():
            for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
                key = f"{prefix}.{name}" if prefix else name
                known = first.setdefault(id(parameter), key)
                if known != key:
                    self._aliases.setdefault(known, []).append(key)
                elif parameter.requires_grad and not is_lazy(parameter):
                    self._owners[key] = (part, name)
                else:
                    self._waiting[key] = parameter
            for name, buffer in part.named_buffers(recurse=False):
                key = f"{prefix}.{name}" if prefix else name
                if key in saved and _is_averaged(buffer):
                    self._owners[key] = (part, name)

    def follow(self) -> bool:
        """Adds parameters that have become trainable; returns whether there are any."""
        if not any(p.requires_grad and not is_lazy(p) for p in self._waiting.values()):
            return False
        self.find()
        return True

    def _live(self) -> dict[str, Tensor]:
        # A forward pass without gradients leaves whole parameters registered in a root module.
        for part in self._sharding:
            part.reshard()  # type: ignore[operator]  # FSDP2, whose import takes 60 ms
        return {key: getattr(owner, name) for key, (owner, name) in self._owners.items()}

    @property
    def is_sharded(self) -> bool:
        """Whether this process has only shards of the tensors."""
        return any(isinstance(tensor, DTensor) for tensor in self._live().values())

    def local(self) -> Weights:
        """Returns the live tensors of this process, detached."""
        return {key: to_local(tensor.detach()) for key, tensor in self._live().items()}

    def copies(self) -> Weights:
        """Returns copies of the tensors of this process."""
        return {key: tensor.clone() for key, tensor in self.local().items()}

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Writes values into the tensors of this process; other tensors stay as they are."""
        for key, tensor in self.local().items():
            if key in values:
                tensor.copy_(values[key])

    def differ(self, values: Mapping[str, Tensor]) -> bool:
        """Returns whether the tensors of this process differ from values, in their own dtype."""
        return any(
            not torch.equal(tensor, values[key].to(tensor))
            for key, tensor in self.local().items()
            if key in values
        )

    def wrapped(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns shards of this process as DTensors on their devices, others as they are."""
        live = self._live()
        return {key: _wrap(live[key], value) for key, value in values.items() if key in live}

    def whole(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns whole tensors; a collective if they are sharded."""
        return {
            key: value.full_tensor() if isinstance(value, DTensor) else value
            for key, value in self.wrapped(values).items()
        }

    def shards(self, values: Mapping[str, Tensor]) -> Weights:
        """Returns the parts of this process of whole tensors; uses no collectives."""
        live = self._live()
        return {key: _shard(live.get(key), value).clone() for key, value in values.items()}

    def with_aliases(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Adds the further names of tied parameters."""
        named = dict(values)
        for key in values:
            named.update(dict.fromkeys(self._aliases.get(key, ()), values[key]))
        return named


def _is_averaged(buffer: Tensor) -> bool:
    return (buffer.is_floating_point() or buffer.is_complex()) and not is_lazy(buffer)


def _shard(tensor: Tensor | None, value: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return value
    mesh, placements = tensor.device_mesh, tensor.placements
    # Without a source every process takes its own part.
    shards = distribute_tensor(value.to(tensor.device), mesh, placements, src_data_rank=None)
    return shards.to_local()


def _wrap(tensor: Tensor, value: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return value
    return DTensor.from_local(
        value.to(tensor.device),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
