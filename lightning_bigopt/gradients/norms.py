"""The one look at the gradients: every norm that anybody needs, in one pass and in float32."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lightning_bigopt.gradients.kernels import (
    all_on_cpu,
    cpu_norms,
    local_norms,
    wide_dtype,
)
from lightning_bigopt.gradients.sharding import (
    ShardGroups,
    local_part,
    reduce_norms,
    shard_groups,
    without_partial,
)

__all__ = ["GradientNorms", "check_dense", "check_norm_type", "measure", "norms_of"]


_LARGEST = torch.finfo(torch.float32).max
_PLAIN = {Tensor, nn.Parameter}
# Nobody writes these, and to make a tensor costs as much as the norm of one.
_FINITE, _NOT_FINITE = torch.ones((), dtype=torch.bool), torch.zeros((), dtype=torch.bool)


@dataclass(frozen=True, eq=False)
class GradientNorms:
    """Norms of the gradients of some parameters, all on the device.

    Args:
        names: The parameters' names.
        per_tensor: Shape (n,), float32: the norm of each whole gradient, not of a shard.
        total: 0-d, float32: the norm of all of them as one vector.
        finite: 0-d, bool: whether every gradient is finite.
        norm_type: 1, 2 or ``inf``.
        parameters: The parameters themselves, in the order of ``names``.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> norms = measure(list(model.named_parameters()))
        >>> norms.names, norms.per_tensor, norms.value
        (('weight',), tensor([5.]), 5.0)
    """

    names: tuple[str, ...]
    per_tensor: Tensor
    total: Tensor
    finite: Tensor
    norm_type: float = 2.0
    # A factory, so that the class has no attribute of this name in the way of ``__getattr__``.
    parameters: tuple[nn.Parameter, ...] = field(default_factory=tuple, repr=False)
    is_on_host: ClassVar[bool] = False
    """Whether :attr:`value` was never on a device, so that a look at it costs nothing."""

    @classmethod
    def of_numbers(
        cls, pairs: Sequence[tuple[str, nn.Parameter]], numbers: list[float], norm_type: float
    ) -> GradientNorms:
        """Norms that are numbers already, as on a CPU; tensors are made where one is looked at.

        Most updates look at the total only, and to make a tensor costs as much as the norm of one.

        Args:
            pairs: Names and parameters.
            numbers: The norm of each gradient.
            norm_type: 1, 2 or ``inf``.

        Example:
            >>> weight = nn.Parameter(torch.zeros(2))
            >>> GradientNorms.of_numbers([("weight", weight)], [5.0], 2.0).per_tensor
            tensor([5.])
        """
        norms = cls.__new__(cls)
        total = _norm_of_numbers(numbers, norm_type)
        vars(norms).update(
            is_on_host=True,
            norm_type=norm_type,
            _value=math.inf if total > _LARGEST else total,
            _total=total,
            _pairs=pairs,
            _numbers=numbers,
        )
        return norms

    def __getattr__(self, name: str) -> Any:
        # Only for what ``of_numbers`` left to be made on demand.
        make = _ON_DEMAND.get(name)
        if make is None or not self.is_on_host:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        found = vars(self)[name] = make(vars(self))
        return found

    @property
    def value(self) -> float:
        """The total as a number. Synchronises, once however many ask."""
        found: float | None = vars(self).get("_value")  # no cached_property: it takes a lock
        if found is None:
            found = self.total.item()
            self.take_value(found)
        return found

    def take_value(self, value: float) -> None:
        """Takes the total as somebody has read it already, so that :attr:`value` need not.

        Example:
            >>> norms = measure([])
            >>> norms.take_value(0.0)
            >>> norms.value
            0.0
        """
        vars(self)["_value"] = value

    def scaled(self, factor: float) -> GradientNorms:
        """The norms of the gradients times a factor. Does not synchronise.

        Example:
            >>> model = nn.Linear(2, 1, bias=False)
            >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
            >>> measure(list(model.named_parameters())).scaled(0.5).value
            2.5
        """
        return replace(self, per_tensor=self.per_tensor * factor, total=self.total * factor)

    def select(self, indices: Sequence[int]) -> GradientNorms:
        """The norms of some of the parameters, with a total of their own. Does not synchronise.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> model.weight.grad, model.bias.grad = torch.ones(1, 2), torch.tensor([7.0])
            >>> measure(list(model.named_parameters())).select([1]).value
            7.0
        """
        parts = self.per_tensor.unbind()
        chosen = (
            torch.stack([parts[index] for index in indices]) if indices else self.per_tensor[:0]
        )
        total, finite = _total(chosen.to(wide_dtype(chosen.device)), self.norm_type)
        return GradientNorms(
            names=tuple([self.names[index] for index in indices]),
            per_tensor=chosen,
            total=total,
            finite=finite,
            norm_type=self.norm_type,
            parameters=tuple([self.parameters[index] for index in indices]),
        )


@torch.no_grad()
def measure(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    norm_type: float = 2.0,
    process_group: ProcessGroup | None = None,
    is_sharded: Callable[[nn.Parameter], bool] | None = None,
) -> GradientNorms:
    """Takes the norm of every gradient and of all of them. Does not synchronise with the host.

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
        norms = _norms_of(tensors, order, groups)
        total, finite = _total(norms, order)
    except (NotImplementedError, RuntimeError):
        check_dense(pairs, tensors)  # which no kernel minds where they are
        raise
    return GradientNorms(
        names=_names(pairs),
        per_tensor=norms.float(),
        total=total,
        finite=finite,
        norm_type=order,
        parameters=_owners(pairs),
    )


@torch.no_grad()
def norms_of(
    tensors: Sequence[Tensor],
    norm_type: float = 2.0,
    *,
    groups: Sequence[ShardGroups] | None = None,
) -> Tensor:
    """The norms of whole tensors, plain and DTensors alike. Does not synchronise.

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


def _total(norms: Tensor, order: float) -> tuple[Tensor, Tensor]:
    """The norm of norms in float32, and whether it is finite in their own precision."""
    if norms.is_cpu:
        return _total_of(norms.tolist(), order)
    if not len(norms):
        return norms.new_zeros((), dtype=torch.float32), norms.new_ones((), dtype=torch.bool)
    whole = torch.linalg.vector_norm(norms, order)
    return whole.float(), whole < math.inf


def _total_of(values: list[float], order: float) -> tuple[Tensor, Tensor]:
    """The same of numbers: on a CPU a few of them are faster than a few tensors."""
    total = _norm_of_numbers(values, order)
    return _scalar(total), _is_finite(total)


def _norm_of_numbers(values: list[float], order: float) -> float:
    """The norm of norms; NaN and infinity go through."""
    total = math.hypot(*values) if order == 2.0 else sum(values)
    if order == math.inf and math.isfinite(total):
        return max(values, default=0.0)
    return total


def _scalar(total: float) -> Tensor:
    # As float32 holds it: what is beyond its largest number makes scalar_tensor raise.
    return torch.scalar_tensor(math.inf if total > _LARGEST else total, dtype=torch.float32)


def _is_finite(total: float) -> Tensor:
    return _FINITE if math.isfinite(total) else _NOT_FINITE


def _float32(values: list[float]) -> Tensor:
    return torch.frombuffer(array("f", values), dtype=torch.float32) if values else torch.zeros(0)


def _names(pairs: Sequence[tuple[str, nn.Parameter]]) -> tuple[str, ...]:
    return tuple([name for name, _ in pairs])


def _owners(pairs: Sequence[tuple[str, nn.Parameter]]) -> tuple[nn.Parameter, ...]:
    return tuple([parameter for _, parameter in pairs])


_ON_DEMAND: Mapping[str, Callable[[dict[str, Any]], Any]] = {
    "names": lambda known: _names(known["_pairs"]),
    "parameters": lambda known: _owners(known["_pairs"]),
    "per_tensor": lambda known: _float32(known["_numbers"]),
    "total": lambda known: _scalar(known["_value"]),
    "finite": lambda known: _is_finite(known["_total"]),
}
