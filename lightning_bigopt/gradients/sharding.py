"""Local shards of DTensors, and the process groups over which they are sharded."""

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
    "redistribute_like_parameter_",
    "reduce_norms",
    "reduce_partial",
    "shard_groups",
    "to_local",
]

ShardGroups: TypeAlias = tuple[ProcessGroup, ...]
"""The process groups over which a tensor is sharded, one for each sharded mesh dimension."""


def to_local(tensor: Tensor) -> Tensor:
    """Returns a view of the local shard of a DTensor; a plain tensor unchanged."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        local: Tensor = tensor.to_local()
    # With tensor parallelism the local tensor may be the result of an unfinished collective.
    finished: Tensor = local.wait() if hasattr(local, "wait") else local
    return finished


def reduce_partial(tensor: Tensor) -> Tensor:
    """Returns the tensor after its pending sums over processes; a collective if there are any."""
    if not isinstance(tensor, DTensor) or not any(p.is_partial() for p in tensor.placements):
        return tensor
    # The norm of a sum cannot be computed from the norms of its parts.
    placements = [Replicate() if p.is_partial() else p for p in tensor.placements]
    return tensor.redistribute(placements=placements)


def redistribute_like_parameter_(parameter: nn.Parameter) -> Tensor:
    """Redistributes a gradient to the placements of its parameter, and returns it."""
    gradient = parameter.grad
    assert gradient is not None  # callers skip parameters without a gradient
    if not isinstance(gradient, DTensor) or not isinstance(parameter, DTensor):
        return gradient
    if gradient.placements != parameter.placements:
        parameter.grad = gradient.redistribute(placements=parameter.placements)
    assert parameter.grad is not None
    return parameter.grad


def shard_groups(tensor: Tensor, *, beyond_dim: int | None = None) -> ShardGroups:
    """Returns the process groups over which a tensor is sharded.

    Args:
        tensor: A plain tensor or a DTensor.
        beyond_dim: Include only shards along later dimensions of the tensor; None includes all.

    Returns:
        One group for each sharded mesh dimension with more than one process; empty if every process
        has the full tensor.
    """
    if not isinstance(tensor, DTensor):
        return ()
    mesh, groups = tensor.device_mesh, []
    for mesh_dim, placement in enumerate(tensor.placements):
        # Not is_shard(), which is false for the strided shards of FSDP2 × tensor parallelism.
        if placement.is_replicate() or placement.is_partial() or mesh.size(mesh_dim) == 1:
            continue
        if beyond_dim is None or _sharded_dim(placement) % tensor.ndim > beyond_dim:
            groups.append(mesh.get_group(mesh_dim))
    return tuple(groups)


def _sharded_dim(placement: Any) -> int:
    # Shard and _StridedShard both have this attribute, but no common base class.
    return int(placement.dim)


def reduce_norms(
    norms: Sequence[Tensor], groups: Sequence[ShardGroups], order: float
) -> list[Tensor]:
    """Combines norms of shards into norms of full tensors; one collective per mesh dimension.

    Args:
        norms: For each tensor a vector with the norm of its local shard, or of each of its units.
        groups: For each tensor the groups over which it is sharded; equal on all processes.
        order: Order of the norms: 1, 2 or ``inf``.

    Returns:
        Vectors of the same lengths, equal on all processes of the groups. With ``order=inf`` a NaN
        becomes ``inf``.
    """
    full = list(norms)
    # One collective for all tensors that are sharded over the same groups.
    members: dict[ShardGroups, list[int]] = {}
    for index, key in enumerate(groups):
        if key:
            members.setdefault(key, []).append(index)
    for key, indices in members.items():
        powers = torch.cat([full[index] for index in indices])
        if order == math.inf:
            # The maximum of a NaN and a number depends on the backend, and may lose the NaN.
            powers = powers.nan_to_num(nan=math.inf, posinf=math.inf)
            operation = dist.ReduceOp.MAX
        else:
            powers = powers.pow(order)
            operation = dist.ReduceOp.SUM
        for group in key:
            dist.all_reduce(powers, op=operation, group=group)
        reduced = powers if order == math.inf else powers.pow(1.0 / order)
        sizes = [len(full[index]) for index in indices]
        for index, part in zip(indices, torch.split(reduced, sizes), strict=True):
            full[index] = part
    return full
