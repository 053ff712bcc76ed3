"""The norms of the gradients of one update, as every consumer reads them."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from struct import Struct
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_bigopt.gradients.kernels import wide_dtype

__all__ = ["GradientNorms"]

_LARGEST = torch.finfo(torch.float32).max
_FLOAT32 = Struct("f")


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
        >>> from lightning_bigopt.gradients import measure
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
            _value=_single(total),
            _total=total,
            _pairs=tuple(pairs),
            _numbers=numbers,
        )
        return norms

    @classmethod
    def of_vector(
        cls, pairs: Sequence[tuple[str, nn.Parameter]], norms: Tensor, norm_type: float
    ) -> GradientNorms:
        """Norms that lie on a device. Does not synchronize, but where that device is the CPU.

        Args:
            pairs: Names and parameters.
            norms: Shape (n,), in the precision in which they are put together.
            norm_type: 1, 2 or ``inf``.

        Example:
            >>> weight = nn.Parameter(torch.zeros(2))
            >>> GradientNorms.of_vector([("weight", weight)], torch.tensor([5.0]), 2.0).total
            tensor(5.)
        """
        if norms.is_cpu:
            return cls.of_numbers(pairs, norms.tolist(), norm_type)
        total = torch.linalg.vector_norm(norms, norm_type) if len(norms) else norms.new_zeros(())
        return cls(
            names=_names(pairs),
            per_tensor=norms.float(),
            total=total.float(),
            finite=total < math.inf,
            norm_type=norm_type,
            parameters=_owners(pairs),
        )

    def __getattr__(self, name: str) -> Any:
        # Only for what ``of_numbers`` left to be made on demand.
        make = _ON_DEMAND.get(name)
        if make is None or not self.is_on_host:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        found = vars(self)[name] = make(vars(self))
        return found

    @property
    def value(self) -> float:
        """The total as a number. Synchronizes, once however many ask."""
        found: float | None = vars(self).get("_value")  # no cached_property: it takes a lock
        if found is None:
            found = self.total.item()
            self.take_value(found)
        return found

    def take_value(self, value: float) -> None:
        """Takes the total as somebody has read it already, so that :attr:`value` need not.

        Example:
            >>> from lightning_bigopt.gradients import measure
            >>> norms = measure([])
            >>> norms.take_value(0.0)
            >>> norms.value
            0.0
        """
        vars(self)["_value"] = value

    def scaled(self, factor: float) -> GradientNorms:
        """The norms of the gradients times a factor. Does not synchronize.

        Example:
            >>> model = nn.Linear(2, 1, bias=False)
            >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
            >>> from lightning_bigopt.gradients import measure
            >>> measure(list(model.named_parameters())).scaled(0.5).value
            2.5
        """
        if self.is_on_host:
            known = vars(self)
            scaled = [number * factor for number in known["_numbers"]]
            return GradientNorms.of_numbers(known["_pairs"], scaled, self.norm_type)
        return replace(self, per_tensor=self.per_tensor * factor, total=self.total * factor)

    def select(self, indices: Sequence[int]) -> GradientNorms:
        """The norms of some of the parameters, with a total of their own. Does not synchronize.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> model.weight.grad, model.bias.grad = torch.ones(1, 2), torch.tensor([7.0])
            >>> from lightning_bigopt.gradients import measure
            >>> measure(list(model.named_parameters())).select([1]).value
            7.0
        """
        if self.is_on_host:
            known = vars(self)
            return GradientNorms.of_numbers(
                [known["_pairs"][index] for index in indices],
                [known["_numbers"][index] for index in indices],
                self.norm_type,
            )
        parts = self.per_tensor.unbind()
        chosen = (
            torch.stack([parts[index] for index in indices]) if indices else self.per_tensor[:0]
        )
        return GradientNorms.of_vector(
            [(self.names[index], self.parameters[index]) for index in indices],
            chosen.to(wide_dtype(chosen.device)),
            self.norm_type,
        )


def _norm_of_numbers(values: list[float], order: float) -> float:
    """The norm of norms; NaN and infinity go through."""
    total = math.hypot(*values) if order == 2.0 else sum(values)
    if order == math.inf and math.isfinite(total):
        return max(values, default=0.0)
    return total


def _single(number: float) -> float:
    """As float32 holds it, beyond whose largest number is infinity."""
    held: tuple[float] = _FLOAT32.unpack(_FLOAT32.pack(math.inf if number > _LARGEST else number))
    return held[0]


def _is_finite(total: float) -> Tensor:
    return torch.scalar_tensor(math.isfinite(total), dtype=torch.bool)


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
    "total": lambda known: torch.scalar_tensor(known["_value"], dtype=torch.float32),
    "finite": lambda known: _is_finite(known["_total"]),
}
