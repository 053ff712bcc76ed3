"""Measures norms of plain and sharded gradients in one pass, without host synchronization."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lightning_bigopt.checks import shown
from lightning_bigopt.gradients.gradient_norms import GradientNorms, HostNorms, norms_from_tensor
from lightning_bigopt.gradients.norm_kernels import (
    all_on_cpu,
    cpu_norms,
    local_norms,
    stored_values,
)
from lightning_bigopt.gradients.sharding import (
    ShardGroups,
    reduce_norms,
    reduce_partial,
    shard_groups,
    to_local,
)
from lightning_bigopt.parameters import listed

__all__ = ["check_dense", "check_norm_type", "measure", "norms_of"]

_PLAIN = {Tensor, nn.Parameter}


@torch.no_grad()
def measure(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    norm_type: float = 2.0,
    process_group: ProcessGroup | None = None,
    is_sharded: Callable[[nn.Parameter], bool] | None = None,
) -> GradientNorms:
    """Computes the norm of each gradient and of all gradients. Does not synchronize with the host.

    A sparse gradient has the norm of its values (:func:`stored_values`).
    Sums are accumulated in float64 if the device supports it (on a CPU over float32 norms of rows),
    so that squares of finite numbers do not overflow. The norms of DTensors, with any mesh and
    placement, are those of the full tensors: this takes one all-reduce of n numbers for each
    sharded mesh dimension.

    Args:
        parameters: Names and parameters. Parameters without a gradient are skipped, and tied
            parameters count once. The list must be equal on all processes if it has DTensors.
        norm_type: Order of the norms: 1, 2 or ``inf``.
        process_group: Process group over which plain parameters are flat shards (FSDP1). All
            trainable parameters are then included, so that all processes have the same list; the
            norm is 0 if no process has a gradient.
        is_sharded: With ``process_group``: returns whether a plain parameter is a shard; all are by
            default.

    Returns:
        The norms of the full gradients, equal on all processes.

    Raises:
        ValueError: If the layout of a gradient is neither strided nor ``torch.sparse_coo``, or
            ``norm_type`` is not supported.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> measure(list(model.named_parameters()), norm_type=1.0).total
        tensor(6.)
    """
    order = check_norm_type(norm_type)
    try:
        given = parameters if isinstance(parameters, list) else listed(parameters, tuple)
        pairs = cast("list[tuple[str, nn.Parameter]]", given)  # None raises a TypeError below
        if len(set(map(id, [parameter for _, parameter in pairs]))) < len(pairs):
            # Tied parameters: reversed twice, so that the first name of each is kept, in order.
            pairs = list({id(pair[1]): pair for pair in reversed(pairs)}.values())[::-1]
        gradients = [parameter.grad for _, parameter in pairs]
    except (AttributeError, OverflowError, TypeError, ValueError):
        raise ValueError(
            f"parameters must be pairs of name and parameter, got {shown(parameters)}; write "
            "list(module.named_parameters())"
        ) from None
    if type(None) in set(map(type, gradients)):
        if process_group is None:
            pairs = [pair for pair in pairs if pair[1].grad is not None]
        else:
            pairs = [pair for pair in pairs if pair[1].requires_grad]
        gradients = [parameter.grad for _, parameter in pairs]
    tensors = cast("list[Tensor]", gradients)
    groups: list[ShardGroups] | None = None
    if process_group is not None:
        # A process whose shard of a parameter is empty has no gradient, but must take part in the
        # all-reduce with a norm of 0.
        tensors = [
            parameter.new_empty(0) if gradient is None else gradient
            for (_, parameter), gradient in zip(pairs, gradients, strict=True)
        ]
        groups = [
            shard_groups(tensor)
            or ((process_group,) if is_sharded is None or is_sharded(parameter) else ())
            for tensor, (_, parameter) in zip(tensors, pairs, strict=True)
        ]
    try:
        return _measured(pairs, tensors, order, groups)
    except (NotImplementedError, RuntimeError):
        # The kernels raise for sparse tensors. Checking only now saves a pass over all tensors in
        # every update.
        values = [stored_values(tensor) for tensor in tensors]
        check_dense(pairs, values)
        if all(map(is_, values, tensors)):
            raise
        return _measured(pairs, values, order, groups)


def _measured(
    pairs: Sequence[tuple[str, nn.Parameter]],
    tensors: Sequence[Tensor],
    order: float,
    groups: Sequence[ShardGroups] | None,
) -> GradientNorms:
    if groups is None and set(map(type, tensors)) <= _PLAIN and all_on_cpu(tensors):
        return HostNorms(pairs, cpu_norms(tensors, order), order)
    return norms_from_tensor(pairs, _norms_of(tensors, order, groups), order)


@torch.no_grad()
def norms_of(
    tensors: Sequence[Tensor],
    norm_type: float = 2.0,
    *,
    groups: Sequence[ShardGroups] | None = None,
) -> Tensor:
    """Computes the norms of full tensors from plain tensors and DTensors. Does not synchronize.

    Args:
        tensors: The tensors; the list must be equal on all processes if it has DTensors.
        norm_type: Order of the norms: 1, 2 or ``inf``.
        groups: Process groups over which each tensor is sharded; by default those of its
            placements.

    Returns:
        The norms, of shape ``(n,)``, float64 if the device supports it.

    Example:
        >>> norms_of([torch.ones(4), torch.tensor(-3.0)]).tolist()
        [2.0, 3.0]
    """
    return _norms_of(tensors, check_norm_type(norm_type), groups)


def _norms_of(
    tensors: Sequence[Tensor], order: float, groups: Sequence[ShardGroups] | None
) -> Tensor:
    if set(map(type, tensors)) <= _PLAIN:
        norms = local_norms(tensors, order)
    else:
        reduced = [reduce_partial(tensor) for tensor in tensors]
        if groups is None:
            groups = [shard_groups(tensor) for tensor in reduced]
        norms = local_norms([to_local(tensor) for tensor in reduced], order)
    if groups is None or not any(groups):
        return norms
    return torch.cat(reduce_norms(torch.split(norms, 1), groups, order))


def check_dense(pairs: Sequence[tuple[str, nn.Parameter]], tensors: Sequence[Tensor]) -> None:
    """Raises if a gradient is sparse.

    Raises:
        ValueError: If a gradient is sparse; the message names the parameter.
    """
    for (name, _), tensor in zip(pairs, tensors, strict=True):
        if tensor.layout is not torch.strided:
            raise ValueError(
                f"the gradient of {name} must be dense, got layout {tensor.layout}; pass "
                "sparse=False to the embedding"
            )


def check_norm_type(norm_type: Any) -> float:
    """Returns the order of a norm as a float.

    Raises:
        ValueError: If it is not 1, 2 or ``inf``.
    """
    # Not ``in``: True equals 1, and an array compares element by element.
    if not (isinstance(norm_type, (int, float)) and not isinstance(norm_type, bool)) or (
        norm_type not in (1, 2, math.inf)
    ):
        raise ValueError(f"norm_type must be 1, 2 or inf, got {shown(norm_type)}; write 2.0")
    return float(norm_type)
