"""Skips one update of an optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_bigopt.checks import shown
from lightning_bigopt.gradients.apply import clear_
from lightning_bigopt.gradients.optimizer_step import step_control
from lightning_bigopt.optimizers.names import check_optimizer
from lightning_bigopt.parameters import listed

__all__ = ["skip_update_"]


def skip_update_(optimizer: Optimizer, parameters: Iterable[nn.Parameter] | None = None) -> None:
    """Skips the next ``optimizer.step``. Does not synchronize.

    Gradients become None, and the step is not made: parameters, moments, step counters and
    parameter groups do not change. Multiplying gradients by zero would instead decay moments and
    weights, and would not remove a NaN.

    Call it before ``optimizer.step`` or inside its closure, and after a GradScaler's ``unscale_``.
    If a GradScaler skips the step as well, the skip does not apply to the next step with gradients.

    If the first call for an optimizer is made inside the closure of a running step, that step
    continues with gradients of None, and everything is restored after it. Call :func:`step_control`
    before the first step to avoid this: a few optimizers fail without gradients.

    Args:
        optimizer: The optimizer that is about to step.
        parameters: Further parameters, not in its groups, whose gradients become None.

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
    check_optimizer(optimizer)
    clear_(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
    for parameter in () if parameters is None else _checked(parameters):
        parameter.grad = None
    step_control(optimizer).skip_next(unless_gradients=True)


def _checked(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    found = cast("list[nn.Parameter] | None", listed(parameters, Tensor))
    if found is not None:
        return found
    raise ValueError(
        f"parameters must be a list of parameters, got {shown(parameters)}; write "
        "list(module.parameters())"
    )
