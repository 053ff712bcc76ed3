"""Saves and restores the settings in an optimizer's parameter groups."""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["GroupSettings", "restore_settings_", "save_settings"]

GroupSettings: TypeAlias = list[tuple[dict[str, Any], dict[str, Any]]]
"""Each parameter group with a copy of its settings."""


def save_settings(optimizer: Optimizer) -> GroupSettings:
    """Copies all entries of the parameter groups except the parameters.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> saved = save_settings(optimizer)
        >>> optimizer.param_groups[0] |= {"lr": 0.2, "updates": 1}
        >>> restore_settings_(saved)
        >>> optimizer.param_groups[0]["lr"], "updates" in optimizer.param_groups[0]
        (0.1, False)
    """
    return [
        (group, {name: _copy(value) for name, value in group.items() if name != "params"})
        for group in optimizer.param_groups
    ]


def restore_settings_(saved: GroupSettings) -> None:
    """Restores saved settings and deletes new ones; tensors are restored in place."""
    for group, settings in saved:
        for name in group.keys() - settings.keys() - {"params"}:
            del group[name]
        for name, value in settings.items():
            if isinstance(value, Tensor) and isinstance(group[name], Tensor):
                group[name].copy_(value)
            else:
                group[name] = value


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
