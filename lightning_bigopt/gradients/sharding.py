"""What a distributed tensor holds here, and over which processes its parts are summed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate

__all__ = [
    "ShardGroups",
    "local_part",
    "reduce_norms",
    "settle_",
    "shard_groups",
    "without_partial",
]

ShardGroups: TypeAlias = tuple[ProcessGroup, ...]
"""The process groups over which a tensor's parts lie, one for each sharded mesh dimension."""


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies in this process, as a view; the tensor itself where plain."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        local: Tensor = tensor.to_local()
    # Tensor parallelism hands over results of collectives that may still be under way.
    settled: Tensor = local.wait() if hasattr(local, "wait") else local
    return settled


def without_partial(tensor: Tensor) -> Tensor:
    """The tensor with its pending sums over processes carried out; itself where there are none."""
    if not isinstance(tensor, DTensor) or not any(p.is_partial() for p in tensor.placements):
        return tensor
    settled = [Replicate() if p.is_partial() else p for p in tensor.placements]
    return tensor.redistribute(placements=settled)


def settle_(parameter: nn.Parameter) -> Tensor:
    """The parameter's gradient, placed as the parameter is, for good."""
    gradient = parameter.grad
    assert gradient is not None  # callers leave out parameters without one
    if not isinstance(gradient, DTensor) or not isinstance(parameter, DTensor):
        return gradient
    if gradient.placements != parameter.placements:
        parameter.grad = gradient.redistribute(placements=parameter.placements)
    assert parameter.grad is not None
    return parameter.grad


def shard_groups(tensor: Tensor, *, beyond_dim: int | None = None) -> ShardGroups:
    """The groups over which the parts of a tensor lie; empty where every process holds all of it.

    Args:
        tensor: A plain tensor or a DTensor.
        beyond_dim: Count only shards of the tensor's later dimensions.

    Returns:
        One group for each such mesh dimension of more than one process.
    """
    if not isinstance(tensor, DTensor):
        return ()
    mesh, found = tensor.device_mesh, []
    for mesh_dim, placement in enumerate(tensor.placements):
        # Not is_shard(): it is false for the strided shards of FSDP2 × tensor parallelism.
        if placement.is_replicate() or placement.is_partial() or mesh.size(mesh_dim) == 1:
            continue
        if beyond_dim is None or _sharded_dim(placement) % tensor.ndim > beyond_dim:
            found.append(mesh.get_group(mesh_dim))
    return tuple(found)


def _sharded_dim(placement: Any) -> int:
    """The tensor's dimension that a shard divides; Shard and its strided twin share no class."""
    return int(placement.dim)


def reduce_norms(
    norms: Sequence[Tensor], groups: Sequence[ShardGroups], order: float
) -> list[Tensor]:
    """Makes norms of parts into norms of the whole: one collective for each mesh dimension.

    Args:
        norms: For each tensor a vector, of the local part's norm or its units' norms.
        groups: For each tensor the groups over which it is spread; the same on every process.
        order: 1, 2 or ``inf``.

    Returns:
        Vectors of the same lengths, the same on every process of the groups. With ``order=inf`` a
        NaN becomes ``inf``, because a maximum over processes may lose it.
    """
    whole = list(norms)
    members: dict[ShardGroups, list[int]] = {}
    for index, key in enumerate(groups):
        if key:
            members.setdefault(key, []).append(index)
    for key, indices in members.items():
        powers = torch.cat([whole[index] for index in indices])
        if order == math.inf:
            powers = powers.nan_to_num(nan=math.inf, posinf=math.inf)
            operation = dist.ReduceOp.MAX
        else:
            powers = powers.pow(order)
            operation = dist.ReduceOp.SUM
        for group in key:
            dist.all_reduce(powers, op=operation, group=group)
        reduced = powers if order == math.inf else powers.pow(1.0 / order)
        sizes = [len(whole[index]) for index in indices]
        for index, part in zip(indices, torch.split(reduced, sizes), strict=True):
            whole[index] = part
    return whole
