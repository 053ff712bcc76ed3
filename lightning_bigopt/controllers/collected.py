"""Values of one update that wait on their devices, to be fetched with one transfer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

__all__ = ["Collected"]


class Collected:
    """Names with numbers, 0-d tensors, and vectors that hold a number for each of several names.

    Example:
        >>> values = Collected()
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
        """Keeps a number, or a tensor of one element. Does not synchronize."""
        if isinstance(value, Tensor):
            self._tensors.append(((name,), value.detach().reshape(1)))
        else:
            self._numbers[name] = float(value)

    def add_vector(self, names: Sequence[str], values: Tensor) -> None:
        """Keeps a tensor of shape (n,) with n names. Does not synchronize."""
        self._tensors.append((names, values.detach()))

    def fetch(self) -> dict[str, float]:
        """All values, those on a device with one transfer."""
        found = dict(self._numbers)
        if not self._tensors:
            return found
        tensors = [tensor for _, tensor in self._tensors]
        device = next((tensor.device for tensor in tensors if not tensor.is_cpu), None)
        if device is None:  # there is nothing to transfer
            numbers: Iterator[float] = chain.from_iterable(map(Tensor.tolist, tensors))
        else:
            wide = torch.float32 if device.type == "mps" else torch.float64
            numbers = iter(torch.cat([tensor.to(device, wide) for tensor in tensors]).tolist())
        for names, _ in self._tensors:
            found.update(zip(names, numbers, strict=False))  # takes len(names) of them
        return found
