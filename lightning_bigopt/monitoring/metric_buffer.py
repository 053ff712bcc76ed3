"""Buffers metrics on the device and transfers them in one copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from lightning_bigopt.gradients.norm_kernels import accumulation_dtype

__all__ = ["MetricBuffer"]


class MetricBuffer:
    """Collects numbers, 0-d tensors and vectors by name, and fetches all in one transfer.

    Example:
        >>> values = MetricBuffer()
        >>> values.add("lr", 0.1)
        >>> values.add("norm", torch.tensor(2.0))
        >>> values.add_vector(["a", "b"], torch.tensor([3.0, 4.0]))
        >>> values.fetch()
        {'lr': 0.1, 'norm': 2.0, 'a': 3.0, 'b': 4.0}
    """

    def __init__(self) -> None:
        self._numbers: dict[str, float] = {}
        self._tensors: list[tuple[Sequence[str], Tensor]] = []

    def __bool__(self) -> bool:
        return bool(self._numbers or self._tensors)

    def add(self, name: str, value: float | Tensor) -> None:
        """Adds a number, or a tensor of one element. Does not synchronize."""
        if isinstance(value, Tensor):
            self._tensors.append(((name,), value.detach().reshape(1)))
        else:
            self._numbers[name] = float(value)

    def add_vector(self, names: Sequence[str], values: Tensor) -> None:
        """Adds a tensor of shape (n,) with n names. Does not synchronize."""
        self._tensors.append((names, values.detach()))

    def fetch(self) -> dict[str, float]:
        """Returns all values by name. Synchronizes once if any tensor is on a device."""
        values = dict(self._numbers)
        if not self._tensors:
            return values
        tensors = [tensor for _, tensor in self._tensors]
        device = next((tensor.device for tensor in tensors if not tensor.is_cpu), None)
        if device is None:  # all tensors are on the CPU: nothing to transfer
            numbers: Iterator[float] = chain.from_iterable(map(Tensor.tolist, tensors))
        else:
            dtype = accumulation_dtype(device)
            numbers = iter(torch.cat([tensor.to(device, dtype) for tensor in tensors]).tolist())
        for names, _ in self._tensors:
            # zip advances ``names`` first: it consumes exactly len(names) numbers.
            values.update(zip(names, numbers, strict=False))
        return values
