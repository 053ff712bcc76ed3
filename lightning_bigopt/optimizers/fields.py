"""Numbers of a parameter group, read and written by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["GroupField"]


class GroupField:
    """A number in a parameter group, by name and, inside a tuple, by index.

    Args:
        name: Such as ``"weight_decay"`` or ``"betas[0]"``.

    Raises:
        ValueError: If the name is not of that form.

    Example:
        >>> group = {"betas": (0.9, 0.999)}
        >>> field = GroupField("betas[1]")
        >>> field.write(group, 0.95), field.read(group), group
        (None, 0.95, {'betas': (0.9, 0.95)})
    """

    def __init__(self, name: str) -> None:
        match = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", name)
        if match is None or match[1] == "params":
            raise ValueError(
                f"field must name a number of the parameter groups, got {name!r}; write "
                "'weight_decay', 'momentum', 'betas[0]' or another field"
            )
        self.name = name
        self._key = match[1]
        self._index = None if match[2] is None else int(match[2])

    def read(self, group: Mapping[str, Any]) -> float:
        """The value in a group.

        Raises:
            ValueError: If the group has no such number.
        """
        value = group.get(self._key)
        if self._index is not None and isinstance(value, (tuple, list)):
            value = value[self._index] if self._index < len(value) else None
        if isinstance(value, Tensor) and value.numel() == 1:
            return float(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            numbers = sorted(k for k, v in group.items() if isinstance(v, (int, float, tuple)))
            raise ValueError(
                f"field must name a number of the parameter groups, got {self.name!r}; the groups "
                f"hold {', '.join(numbers)}"
            )
        return float(value)

    def write(self, group: dict[str, Any], value: float) -> None:
        """Writes the value; a tensor is filled in place, so that nothing recompiles."""
        if self._index is None:
            if isinstance(group[self._key], Tensor):
                group[self._key].fill_(value)
            else:
                group[self._key] = value
            return
        parts = list(group[self._key])
        if isinstance(parts[self._index], Tensor):
            parts[self._index].fill_(value)
        else:
            parts[self._index] = value
            group[self._key] = type(group[self._key])(parts)
