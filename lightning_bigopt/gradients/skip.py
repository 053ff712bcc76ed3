"""Leaves one update out: parameters and optimizer state stay as they are, to the bit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_bigopt.gradients.apply import clear_, while_stepping

__all__ = ["skip_update_"]


def skip_update_(optimizer: Optimizer, parameters: Iterable[nn.Parameter] | None = None) -> None:
    """Makes the coming ``optimizer.step`` change nothing. Does not synchronize.

    Gradients become None, which every optimizer of torch passes over: no moment, no step counter,
    no weight decay. What an optimizer counts in its parameter groups (schedulefree's ``k`` and
    ``weight_sum``) is put back once it has stepped. To multiply the gradients by zero instead
    would decay moments and weights, and leave a NaN a NaN.

    It may be called before ``optimizer.step`` or inside its closure, and after a GradScaler's
    ``unscale_``. If the step never comes, because the GradScaler leaves it out too, the next step
    with gradients is not touched. Optimizers that call their closure several times, as LBFGS
    does, cannot be skipped this way.

    Args:
        optimizer: The optimizer about to step.
        parameters: Its parameters; read from its groups by default.

    Example:
        >>> import torch
        >>> weight = nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.AdamW([weight], weight_decay=0.1)
        >>> weight.grad = torch.tensor([float("nan")])
        >>> skip_update_(optimizer)
        >>> optimizer.step()
        >>> weight.data, len(optimizer.state)
        (tensor([1.]), 0)
    """
    clear_(optimizer)
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    skipped = owned if parameters is None else [*owned, *parameters]
    for parameter in skipped:
        parameter.grad = None
    before = [(group, _settings(group)) for group in optimizer.param_groups]

    def restore() -> None:
        if any(parameter.grad is not None for parameter in owned):
            return  # this step is a later one: the skipped step itself never came
        for group, settings in before:
            for name in group.keys() - settings.keys() - {"params"}:
                del group[name]
            for name, value in settings.items():
                current = group[name]
                if isinstance(value, Tensor) and isinstance(current, Tensor):
                    current.copy_(value)
                else:
                    group[name] = value

    while_stepping(optimizer, restore)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else value
        for name, value in group.items()
        if name != "params"
    }
