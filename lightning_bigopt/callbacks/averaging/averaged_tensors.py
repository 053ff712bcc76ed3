"""The parameters and buffers of a module that are averaged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parameter import is_lazy

from lightning_bigopt.averaging.weights import Weights
from lightning_bigopt.gradients.sharding import to_local
from lightning_bigopt.optimizers.stored_training import sharded_like
from lightning_bigopt.trainer_access.strategies import sharded_modules

__all__ = ["AveragedTensors"]


class AveragedTensors:
    """The trainable parameters and the floating-point buffers of a module, by name.

    Names are those of the module's ``state_dict``. Left out are parameters that are frozen, until
    they become trainable, and buffers that the ``state_dict`` does not contain or that are not
    finite, such as masks. Sharded parameters (FSDP2) are represented by the shards of this process.

    Args:
        module: The module.
        buffers: Whether buffers are included.
        also: Names of parameters that are included although they are frozen.
    """

    def __init__(self, module: nn.Module, *, buffers: bool, also: Iterable[str] = ()) -> None:
        self._module = module
        self._averages_buffers = buffers
        self._also = set(also)
        self._owners: dict[str, tuple[nn.Module, str]] = {}  # where each tensor is registered
        self._names: list[str] = []  # of the averaged ones
        self._waiting: dict[str, nn.Parameter] = {}  # frozen or lazy parameters
        self._aliases: dict[str, list[str]] = {}  # further names of tied tensors
        self._sharding = sharded_modules(module)
        self.find()

    @torch.no_grad()
    def find(self) -> None:
        """Finds the tensors; the module may have been changed since the last call."""
        self._owners, self._names, self._waiting, self._aliases = {}, [], {}, {}
        saved = self._module.state_dict(keep_vars=True).keys() if self._averages_buffers else ()
        first: dict[int, str] = {}
        # A module under two names saves its tensors under both.
        for prefix, part in self._module.named_modules(remove_duplicate=False):
            parameters = part.named_parameters(recurse=False, remove_duplicate=False)
            buffers = part.named_buffers(recurse=False, remove_duplicate=False)
            for name, tensor in (*parameters, *buffers):
                key = f"{prefix}.{name}" if prefix else name
                known = first.setdefault(id(tensor), key)
                if known != key:
                    self._aliases.setdefault(known, []).append(key)
                    continue
                self._owners[key] = (part, name)
                if not isinstance(tensor, nn.Parameter):
                    if key in saved and _is_averaged(tensor):
                        self._names.append(key)
                elif (tensor.requires_grad or key in self._also) and not is_lazy(tensor):
                    self._names.append(key)
                else:
                    self._waiting[key] = tensor
        self._also.update(self._names)  # a parameter that is frozen again stays

    def follow(self) -> bool:
        """Adds parameters that have become trainable; returns whether there are any."""
        if not any(p.requires_grad and not is_lazy(p) for p in self._waiting.values()):
            return False
        self.find()
        return True

    def _tensor(self, key: str) -> Tensor:
        part, name = self._owners[key]
        tensor: Tensor = getattr(part, name)
        return tensor

    def _live(self) -> dict[str, Tensor]:
        # A forward pass without gradients leaves whole parameters registered in a root module.
        for part in self._sharding:
            part.reshard()
        owners = self._owners
        return {key: getattr(*owners[key]) for key in self._names}

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
        """Writes values into the tensors of this process, also into frozen ones."""
        self._live()  # as shards
        for key, value in values.items():
            if key in self._owners:
                to_local(self._tensor(key).detach()).copy_(value)

    def differ(self, values: Mapping[str, Tensor]) -> bool:
        """Returns whether the parameters differ from values, or are others than these."""
        live = {k: t for k, t in self._live().items() if isinstance(t, nn.Parameter)}
        if live.keys() - values.keys() or values.keys() - self._owners.keys():
            return True
        local = {key: to_local(tensor.detach()) for key, tensor in live.items()}
        return any(not torch.equal(t, values[key].to(t)) for key, t in local.items())

    def wrapped(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns shards of this process as DTensors on their devices, others as they are."""
        self._live()  # as shards
        known = {key: value for key, value in values.items() if key in self._owners}
        return {key: sharded_like(value, self._tensor(key)) for key, value in known.items()}

    def whole(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns whole tensors; a collective if they are sharded."""
        return {
            key: value.full_tensor() if isinstance(value, DTensor) else value
            for key, value in self.wrapped(values).items()
        }

    def shards(self, values: Mapping[str, Tensor]) -> Weights:
        """Returns the parts of this process of whole tensors; uses no collectives."""
        self._live()  # as shards
        known = {key: value for key, value in values.items() if key in self._owners}
        return {key: _shard(self._tensor(key), value).clone() for key, value in known.items()}

    def with_aliases(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Adds the further names of tied tensors."""
        named = dict(values)
        for key in values:
            named.update(dict.fromkeys(self._aliases.get(key, ()), values[key]))
        return named


def _is_averaged(buffer: Tensor) -> bool:
    if is_lazy(buffer) or not (buffer.is_floating_point() or buffer.is_complex()):
        return False
    return bool(to_local(buffer).isfinite().all())


def _shard(tensor: Tensor, value: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return value
    mesh, placements = tensor.device_mesh, tensor.placements
    # Without a source every process takes its own part.
    shards = distribute_tensor(value.to(tensor.device), mesh, placements, src_data_rank=None)
    return shards.to_local()
