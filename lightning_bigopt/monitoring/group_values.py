"""The hyperparameters of a parameter group that are logged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["hyperparameters_of"]


def hyperparameters_of(group: Mapping[str, Any]) -> dict[str, float | Tensor]:
    """Returns the values of a parameter group that are logged, by tag."""
    momentum = group.get("momentum")
    if momentum is None and group.get("betas"):
        momentum = group["betas"][0]
    values = {
        "optim/lr": group.get("lr"),
        "optim/weight_decay": group.get("weight_decay"),
        "optim/momentum": momentum,
    }
    # A tensor is cloned: the engine overwrites it for the next update before it is transferred.
    return {
        tag: value.detach().clone() if isinstance(value, Tensor) else value
        for tag, value in values.items()
        if value is not None  # the lr of Adafactor(relative_step=True), for example
    }
