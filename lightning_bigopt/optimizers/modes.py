"""Optimizers with a training and an evaluation mode, such as those of schedulefree."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any, Literal
from weakref import WeakSet

from torch import Tensor
from torch.optim import Optimizer

from lightning_bigopt.optimizers.names import part_optimizers

__all__ = ["has_modes", "shows_mode", "state_versions", "switch"]

_version = attrgetter("_version")
_SHOWING: WeakSet[Optimizer] = WeakSet()  # those whose plain values have shown their mode


def has_modes(optimizer: Optimizer) -> bool:
    """Returns whether an optimizer, or a part of a combined one, has ``train()`` and ``eval()``.

    Example:
        >>> import torch
        >>> has_modes(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))
        False
    """
    if parts := part_optimizers(optimizer):
        return any(map(has_modes, parts.values()))
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def switch(optimizer: Any, mode: Literal["train", "eval"]) -> bool:
    """Switches an optimizer, and returns whether one of its plain values has changed."""
    before = _plain_values(optimizer)
    getattr(optimizer, mode)()
    if before == _plain_values(optimizer):
        return False
    _SHOWING.add(optimizer)
    return True


def shows_mode(optimizer: Optimizer) -> bool:
    """Returns whether plain values have changed when the optimizer was switched before."""
    return optimizer in _SHOWING


def state_versions(optimizer: Optimizer) -> list[int]:
    """Returns torch's counts of changes of the tensors in the state of an optimizer."""
    states = [state for state in optimizer.state.values() if isinstance(state, dict)]
    return [_version(v) for state in states for v in state.values() if isinstance(v, Tensor)]


def _plain_values(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Returns the plain attributes and group values of an optimizer and those within it."""
    found: list[dict[str, Any]] = []
    seen: dict[int, Any] = {}
    waiting: list[Any] = [optimizer]
    while waiting:
        one = waiting.pop()
        if id(one) not in seen:
            seen[id(one)] = one
            waiting += part_optimizers(one).values()
            waiting += [value for value in vars(one).values() if hasattr(value, "param_groups")]
            found += map(_plain, (vars(one), *one.param_groups))
    return found


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: v for name, v in values.items() if isinstance(v, bool | int | float | str)}
