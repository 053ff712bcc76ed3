"""Errors for optimizers of Opacus, which clip the gradient of each sample and add noise."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from lightning_bigopt.optimizers.names import is_opacus_optimizer

__all__ = ["check_no_sample_gradients", "check_not_private"]


def check_not_private(optimizers: Iterable[Optimizer], name: str, reason: str) -> None:
    """Raises if an optimizer is from Opacus.

    Args:
        optimizers: The optimizers.
        name: What does not work with Opacus.
        reason: Why, and what to do instead.

    Raises:
        ValueError: If an optimizer is from Opacus.

    Example:
        >>> check_not_private([], "StepGuard", "remove StepGuard")
    """
    for optimizer in optimizers:
        if is_opacus_optimizer(optimizer):
            raise ValueError(
                f"optimizer must not be an optimizer of Opacus with {name}, got "
                f"{type(optimizer).__name__}, {reason}"
            )


def check_no_sample_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Raises if parameters hold the gradients of single samples, from which Opacus steps.

    Raises:
        ValueError: If a parameter has a ``grad_sample``.

    Example:
        >>> import torch
        >>> check_no_sample_gradients([nn.Parameter(torch.zeros(2))])
    """
    if any(getattr(parameter, "grad_sample", None) is not None for parameter in parameters):
        raise ValueError(
            "parameters must have no gradients of samples (Opacus), got some; clipping .grad has "
            "no effect on its step: set max_grad_norm of make_private"
        )
