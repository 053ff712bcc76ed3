"""The one look at the gradients: every norm that anybody needs, in one pass and in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lightning_bigopt.gradients.kernels import all_on_cpu, cpu_norms, local_norms
from lightning_bigopt.gradients.norms import GradientNorms
from lightning_bigopt.gradients.sharding import (
    ShardGroups,
    local_part,
    reduce_norms,
    shard_groups,
    without_partial,
)

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
    """Takes the norm of every gradient and of all of them. Does not synchronize with the host.

    Sums are carried in float64 where the device has it (over rows in float32 on a CPU), so that
    squares of finite numbers do not overflow. DTensors of any mesh and placement count as whole
    tensors: one all-reduce of n numbers for each sharded mesh dimension.

    Args:
        parameters: Names and parameters. Those without a gradient are left out, tied ones count
            once. The same on every process where DTensors are among them.
        norm_type: 1, 2 or ``inf``.
        process_group: Where plain parameters are flat shards (FSDP1): the group over which they
            are sharded. Every trainable parameter is listed then, with norm 0 where no process
            holds a gradient, so that the processes agree.
        is_sharded: With ``process_group``: which plain parameters are shards; all by default.

    Returns:
        The norms, of the whole gradients, the same on every process.

    Raises:
        ValueError: If a gradient is sparse or ``norm_type`` is not supported.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> measure(list(model.named_parameters()), norm_type=1.0).total
        tensor(6.)
    """
    order = check_norm_type(norm_type)
    pairs = parameters if isinstance(parameters, list) else list(parameters)
    if len(set(map(id, [parameter for _, parameter in pairs]))) < len(pairs):
        pairs = list({id(pair[1]): pair for pair in reversed(pairs)}.values())[::-1]
    gradients = [parameter.grad for _, parameter in pairs]
    kinds = set(map(type, gradients))
    if type(None) in kinds:
        if process_group is None:
            pairs = [pair for pair in pairs if pair[1].grad is not None]
        else:
            pairs = [pair for pair in pairs if pair[1].requires_grad]
        gradients = [parameter.grad for _, parameter in pairs]
        kinds.discard(type(None))
    tensors = cast("list[Tensor]", gradients)
    groups: list[ShardGroups] | None = None
    if process_group is not None:
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
        if groups is None and kinds <= _PLAIN and all_on_cpu(tensors):
            return GradientNorms.of_numbers(pairs, cpu_norms(tensors, order), order)
        return GradientNorms.of_vector(pairs, _norms_of(tensors, order, groups), order)
    except (NotImplementedError, RuntimeError):
        check_dense(pairs, tensors)  # which no kernel minds where they are
        raise


@torch.no_grad()
def norms_of(
    tensors: Sequence[Tensor],
    norm_type: float = 2.0,
    *,
    groups: Sequence[ShardGroups] | None = None,
) -> Tensor:
    """The norms of whole tensors, plain and DTensors alike. Does not synchronize.

    Args:
        tensors: The tensors; the same on every process where DTensors are among them.
        norm_type: 1, 2 or ``inf``.
        groups: The groups over which each is sharded; asked of DTensors by default.

    Returns:
        Shape (n,), float64 where the device has it.

    Example:
        >>> norms_of([torch.ones(4), torch.tensor(-3.0)]).tolist()
        [2.0, 3.0]
    """
    return _norms_of(tensors, check_norm_type(norm_type), groups)


def _norms_of(
    tensors: Sequence[Tensor], order: float, groups: Sequence[ShardGroups] | None
) -> Tensor:
    if set(map(type, tensors)) <= _PLAIN:
        found = local_norms(tensors, order)
        return found if groups is None else _whole(found, groups, order)
    settled = [without_partial(tensor) for tensor in tensors]
    if groups is None:
        groups = [shard_groups(tensor) for tensor in settled]
    found = local_norms([local_part(tensor) for tensor in settled], order)
    return _whole(found, groups, order)


def check_dense(pairs: Sequence[tuple[str, nn.Parameter]], tensors: Sequence[Tensor]) -> None:
    """Raises where a gradient is sparse.

    Raises:
        ValueError: With the parameter's name.
    """
    for (name, _), tensor in zip(pairs, tensors, strict=True):
        if tensor.layout is not torch.strided:
            raise ValueError(
                f"the gradient of {name} must be dense, got layout {tensor.layout}; pass "
                "sparse=False to the embedding"
            )


def check_norm_type(norm_type: float) -> float:
    """The order of a norm as a float.

    Raises:
        ValueError: If it is not 1, 2 or ``inf``.
    """
    if norm_type not in (1, 2, math.inf):
        raise ValueError(f"norm_type must be 1, 2 or inf, got {norm_type!r}")
    return float(norm_type)


def _whole(norms: Tensor, groups: Sequence[ShardGroups], order: float) -> Tensor:
    if not any(groups):
        return norms
    return torch.cat(reduce_norms(torch.split(norms, 1), groups, order))
