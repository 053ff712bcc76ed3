"""Fields of parameter groups that are numbers, such as ``lr`` and an entry of ``betas``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lightning_bigopt.checks import shown

__all__ = ["GroupField"]


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
                f"field must name a number of the parameter groups, got {shown(name)}; write "
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
        raise ValueError(self._problem(group, value, is_missing=is_missing))

    def read_all(self, groups: Sequence[Mapping[str, Any]]) -> list[float | None]:
        """Returns the value of each group of an optimizer.

        None for a group without the field, other than ``lr``, if another group has it: the parts of
        a combined optimizer have different fields.

        Raises:
            ValueError: If no group has the field, or a value is no number.

        Example:
            >>> GroupField("momentum").read_all([{"momentum": 0.9}, {"betas": (0.9, 0.95)}])
            [0.9, None]
        """
        is_partial = self.key != "lr" and any(self.key in group for group in groups)
        return [
            None if is_partial and self.key not in group else self.read(group) for group in groups
        ]

    def _problem(self, group: Mapping[str, Any], value: Any, *, is_missing: bool) -> str:
        """Returns the message for a value that is no number."""
        place = f" in {group['name']!r}" if group.get("name") else ""
        # A bool, a tuple or an unknown name is a wrong field. No other field is a learning rate,
        # so a group without one has lost it.
        if self.key == "lr" or not (is_missing or isinstance(value, (bool, tuple, list))):
            found = f"a group without it{place}" if is_missing else f"{shown(value)}{place}"
            return (
                f"{self.name} must be a number in every parameter group, got {found}; pass a "
                "number to the optimizer or in the group"
            )
        numbers = sorted(k for k, v in group.items() if isinstance(v, (int, float, tuple)))
        entries = group.get(self.key)
        if isinstance(entries, (tuple, list)):
            advice = f"write '{self.key}[0]' for the first number of {shown(entries)}"
        elif self.key not in group and (similar := get_close_matches(self.key, numbers, n=1)):
            advice = f"did you mean {similar[0]!r}?"
        else:
            advice = f"the groups have {', '.join(numbers)}"
        return f"field must name a number of the parameter groups, got {shown(self.name)}; {advice}"

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
