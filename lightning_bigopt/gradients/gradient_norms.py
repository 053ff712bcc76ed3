"""Norms of the gradients of one update, held on the host or on a device."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from struct import Struct
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_bigopt.gradients.norm_kernels import accumulation_dtype

__all__ = ["DeviceNorms", "GradientNorms", "HostNorms", "norms_from_tensor", "unread_total"]

_LARGEST = torch.finfo(torch.float32).max
_FLOAT32 = Struct("f")


class GradientNorms(Protocol):
    """Norms of the gradients of some parameters: :class:`HostNorms` or :class:`DeviceNorms`.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> from lightning_bigopt.gradients import measure
        >>> norms = measure(list(model.named_parameters()))
        >>> norms.names, norms.per_tensor, norms.value
        (('weight',), tensor([5.]), 5.0)
    """

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""

    @property
    def per_tensor(self) -> Tensor:
        """Norm of each full gradient (not of its shard), float32 of shape ``(n,)``."""

    @property
    def total(self) -> Tensor:
        """Norm of all gradients as one vector, float32 of shape ``()``."""

    @property
    def last(self) -> Tensor | float:
        """Norm of the gradient of the last parameter: a number on the host; 0 without one."""

    @property
    def finite(self) -> Tensor:
        """Whether all gradients are finite, bool of shape ``()``."""

    @property
    def norm_type(self) -> float:
        """Order of the norms: 1, 2 or ``inf``."""

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters, in the order of :attr:`names`."""

    @property
    def value(self) -> float:
        """:attr:`total` as a number. The first access synchronizes."""

    @property
    def is_on_host(self) -> bool:
        """Whether reading :attr:`value` needs no synchronization."""

    def take_value(self, value: float) -> None:
        """Sets :attr:`value` to a number that was read elsewhere, which saves a synchronization.

        Example:
            >>> from lightning_bigopt.gradients import measure
            >>> norms = measure([])
            >>> norms.take_value(0.0)
            >>> norms.value
            0.0
        """

    def scaled(self, factor: float) -> GradientNorms:
        """Returns the norms of the gradients multiplied by a factor. Does not synchronize.

        Example:
            >>> model = nn.Linear(2, 1, bias=False)
            >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
            >>> from lightning_bigopt.gradients import measure
            >>> measure(list(model.named_parameters())).scaled(0.5).value
            2.5
        """

    def select(self, indices: Sequence[int]) -> GradientNorms:
        """Returns the norms of some parameters, with their own total. Does not synchronize.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> model.weight.grad, model.bias.grad = torch.ones(1, 2), torch.tensor([7.0])
            >>> from lightning_bigopt.gradients import measure
            >>> measure(list(model.named_parameters())).select([1]).value
            7.0
        """


class HostNorms:
    """Norms as Python floats, computed on a CPU.

    Most updates read the total only, and creating a tensor takes as long as the norm of one small
    gradient. Each tensor is therefore created on first access.

    Args:
        pairs: Names and parameters.
        numbers: Norm of each gradient.
        norm_type: Order of the norms: 1, 2 or ``inf``.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> HostNorms([("weight", weight)], [5.0], 2.0).per_tensor
        tensor([5.])
    """

    is_on_host = True

    def __init__(
        self, pairs: Sequence[tuple[str, nn.Parameter]], numbers: list[float], norm_type: float
    ) -> None:
        self.norm_type = norm_type
        self._pairs = tuple(pairs)
        self._numbers = numbers
        total = _norm_of_numbers(numbers, norm_type)
        # Decided before rounding: a float64 norm above the largest float32 is finite, although
        # ``total`` is infinite.
        self._is_finite = math.isfinite(total)
        self._value = _round_to_float32(total)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple([name for name, _ in self._pairs])

    @cached_property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters, in the order of ``names``."""
        return tuple([parameter for _, parameter in self._pairs])

    @cached_property
    def per_tensor(self) -> Tensor:
        """Norm of each gradient, float32 of shape ``(n,)``."""
        if not self._numbers:  # frombuffer rejects an empty buffer
            return torch.zeros(0)
        return torch.frombuffer(array("f", self._numbers), dtype=torch.float32)

    @cached_property
    def total(self) -> Tensor:
        """Norm of all gradients as one vector, float32 of shape ``()``."""
        return torch.scalar_tensor(self._value, dtype=torch.float32)

    @cached_property
    def finite(self) -> Tensor:
        """Whether all gradients are finite, bool of shape ``()``."""
        return torch.scalar_tensor(self._is_finite, dtype=torch.bool)

    @property
    def value(self) -> float:
        """The total as a number, rounded to float32."""
        return self._value

    @property
    def last(self) -> float:
        """Norm of the gradient of the last parameter."""
        return self._numbers[-1] if self._numbers else 0.0

    def take_value(self, value: float) -> None:
        """Replaces :attr:`value`."""
        self._value = value

    def scaled(self, factor: float) -> HostNorms:
        """Returns the norms of the gradients multiplied by a factor."""
        return HostNorms(self._pairs, [number * factor for number in self._numbers], self.norm_type)

    def select(self, indices: Sequence[int]) -> HostNorms:
        """Returns the norms of some parameters, with their own total."""
        return HostNorms(
            [self._pairs[index] for index in indices],
            [self._numbers[index] for index in indices],
            self.norm_type,
        )


@dataclass(eq=False)
class DeviceNorms:
    """Norms as tensors on a device. Only :attr:`value` synchronizes.

    Args:
        names: Names of the parameters.
        per_tensor: Norm of each gradient, float32 of shape ``(n,)``.
        total: Norm of all gradients as one vector, float32 of shape ``()``.
        finite: Whether all gradients are finite, bool of shape ``()``.
        norm_type: Order of the norms: 1, 2 or ``inf``.
        parameters: The parameters, in the order of ``names``.

    Example:
        >>> one = torch.ones(())
        >>> DeviceNorms(
        ...     names=("weight",), per_tensor=one.view(1), total=one, finite=one.isfinite()
        ... ).value
        1.0
    """

    names: tuple[str, ...]
    per_tensor: Tensor
    total: Tensor
    finite: Tensor
    norm_type: float = 2.0
    parameters: tuple[nn.Parameter, ...] = field(default=(), repr=False)
    _value: float | None = field(default=None, init=False, repr=False)

    @property
    def is_on_host(self) -> bool:
        """False: reading :attr:`value` synchronizes."""
        return False

    @property
    def last(self) -> Tensor | float:
        """Norm of the gradient of the last parameter, a tensor of shape ``()``."""
        return self.per_tensor.select(0, -1) if len(self.per_tensor) else 0.0

    @property
    def value(self) -> float:
        """The total as a number. The first access synchronizes."""
        if self._value is None:
            self._value = self.total.item()
        return self._value

    def take_value(self, value: float) -> None:
        """Sets :attr:`value` to a number that was read elsewhere."""
        self._value = value

    def scaled(self, factor: float) -> DeviceNorms:
        """Returns the norms of the gradients multiplied by a factor."""
        return replace(self, per_tensor=self.per_tensor * factor, total=self.total * factor)

    def select(self, indices: Sequence[int]) -> GradientNorms:
        """Returns the norms of some parameters, with their own total."""
        norms = self.per_tensor.unbind()
        chosen = torch.stack([norms[i] for i in indices]) if indices else self.per_tensor[:0]
        return norms_from_tensor(
            [(self.names[index], self.parameters[index]) for index in indices],
            chosen.to(accumulation_dtype(chosen.device)),
            self.norm_type,
        )


def norms_from_tensor(
    pairs: Sequence[tuple[str, nn.Parameter]], norms: Tensor, norm_type: float
) -> GradientNorms:
    """Creates :class:`GradientNorms` from one tensor. Does not synchronize with a device.

    Args:
        pairs: Names and parameters.
        norms: Norm of each gradient, of shape ``(n,)`` in the accumulation dtype.
        norm_type: Order of the norms: 1, 2 or ``inf``.

    Returns:
        :class:`HostNorms` for a tensor on the CPU, :class:`DeviceNorms` for any other.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> norms_from_tensor([("weight", weight)], torch.tensor([5.0]), 2.0).total
        tensor(5.)
    """
    if norms.is_cpu:
        return HostNorms(pairs, norms.tolist(), norm_type)
    total = torch.linalg.vector_norm(norms, norm_type) if len(norms) else norms.new_zeros(())
    return DeviceNorms(
        names=tuple([name for name, _ in pairs]),
        per_tensor=norms.float(),
        total=total.float(),
        finite=total < math.inf,
        norm_type=norm_type,
        parameters=tuple([parameter for _, parameter in pairs]),
    )


def _norm_of_numbers(numbers: Sequence[float], order: float) -> float:
    """Returns the norm of norms; non-finite if one of them is."""
    # hypot scales its arguments, so that squares do not overflow. max() would ignore a NaN that is
    # not the first number, but a sum does not.
    total = math.hypot(*numbers) if order == 2.0 else sum(numbers)
    if order == math.inf and math.isfinite(total):
        return max(numbers, default=0.0)
    return total


def _round_to_float32(number: float) -> float:
    """Rounds to the nearest float32; a norm beyond the largest one becomes infinity."""
    held: tuple[float] = _FLOAT32.unpack(_FLOAT32.pack(math.inf if number > _LARGEST else number))
    return held[0]


def unread_total(norms: GradientNorms) -> float | Tensor:
    """Returns the total norm without a synchronization: a number if the host knows it."""
    return norms.value if norms.is_on_host else norms.total
