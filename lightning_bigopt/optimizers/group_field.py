"""Fields of parameter groups that are numbers, such as ``lr`` and an entry of ``betas``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["GroupField", "separate_tensors"]


class GroupField:
    """Reads and writes a numeric field of a parameter group, or an entry of a tuple.

    Args:
        name: Name of the field, such as ``"weight_decay"`` or ``"betas[0]"``.

    Attributes:
        key: The key in a parameter group.

    Raises:
        ValueError: If ``name`` has another form.

    Example:
        >>> group = {"betas": (0.9, 0.999)}
        >>> field = GroupField("betas[1]")
        >>> field.write(group, 0.95), field.read(group), group
        (0.95, 0.95, {'betas': (0.9, 0.95)})
    """

    def __init__(self, name: str) -> None:
        is_text = isinstance(name, str)
        match = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", name) if is_text else None
        if match is None or match[1] == "params":
            raise ValueError(
                f"field must name a number of the parameter groups, got {name!r}; write "
                "'weight_decay', 'momentum', 'betas[0]' or another field"
            )
        self.name = name
        self.key = match[1]
        self._index = None if match[2] is None else int(match[2])

    def read(self, group: Mapping[str, Any]) -> float:
        """Returns the value of the field in a group.

        Args:
            group: A parameter group of an optimizer.

        Raises:
            ValueError: If the group does not have the field, or it is not a number.
        """
        value = group.get(self.key)
        is_missing = self.key not in group
        if self._index is not None and isinstance(value, (tuple, list)):
            is_missing = self._index >= len(value)
            value = None if is_missing else value[self._index]
        if isinstance(value, Tensor) and value.numel() == 1:
            return float(value)
        if type(value) is not bool and isinstance(value, Real):  # also numbers of NumPy
            return float(value)
        if value is None and not is_missing:
            place = f" in {group['name']!r}" if group.get("name") else ""
            raise ValueError(
                f"{self.name} must be a number in every parameter group, got None{place}; pass a "
                "number to the optimizer or in the group"
            )
        numbers = sorted(k for k, v in group.items() if isinstance(v, (int, float, tuple)))
        raise ValueError(
            f"field must name a number of the parameter groups, got {self.name!r}; the groups "
            f"have {', '.join(numbers)}"
        )

    def write(self, group: dict[str, Any], value: float) -> float:
        """Writes the value to a group; a tensor is filled in place, which avoids recompilation.

        Args:
            group: A parameter group of an optimizer.
            value: The new value.

        Returns:
            The value as the group holds it: rounded to the dtype of a tensor. The device is not
            read.
        """
        current = group[self.key]
        entry = current if self._index is None else current[self._index]
        if isinstance(entry, Tensor):
            entry.fill_(value)
            return float(torch.tensor(value, dtype=entry.dtype))
        if self._index is None:
            group[self.key] = value
        else:
            parts = list(current)
            parts[self._index] = value
            group[self.key] = type(current)(parts)
        return value


def separate_tensors(optimizers: Iterable[Optimizer]) -> None:
    """Gives each group its own tensors: a value is written in place, and would reach all groups.

    The defaults of an optimizer, which a group that is added later gets, are separated, too.
    """
    seen: set[int] = set()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, value in group.items():
                if not isinstance(value, Tensor):
                    continue
                if optimizer.defaults.get(name) is value:
                    optimizer.defaults[name] = group[name].clone()
                if id(value) in seen:
                    group[name] = value.clone()
                seen.add(id(group[name]))
