"""Applies the decision of a clipping rule, in the kernel of a fused optimizer or to gradients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_bigopt.gradients.clip_decision import ClipDecision
from lightning_bigopt.gradients.gradient_norms import GradientNorms
from lightning_bigopt.gradients.optimizer_step import installed_step_control, step_control
from lightning_bigopt.gradients.sharding import to_local
from lightning_bigopt.optimizers.names import check_optimizer

__all__ = ["after_step_once", "apply_", "clear_", "scale_", "takes_grad_scale"]


def takes_grad_scale(optimizer: Optimizer) -> bool:
    """Returns whether all parameter groups are updated by fused kernels, which scale gradients.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> takes_grad_scale(torch.optim.AdamW([weight], fused=True))
        True
        >>> takes_grad_scale(torch.optim.AdamW([weight]))
        False
    """
    check_optimizer(optimizer)
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and all(
        group.get("fused") for group in optimizer.param_groups
    )


def apply_(
    decision: ClipDecision,
    *,
    optimizer: Optimizer | None = None,
    route: Literal["auto", "gradients"] = "auto",
) -> None:
    """Applies the decision of a clipping rule. Does not synchronize with the host.

    A single coefficient is passed to a fused optimizer as ``grad_scale``, together with
    ``found_inf``, so that its kernel skips an update with non-finite gradients. The gradients do
    not change until that kernel writes the clipped ones. Any other decision takes one multi-tensor
    pass over the gradients. On the CPU a coefficient of 1 writes nothing.

    Args:
        decision: The decision.
        optimizer: The optimizer that is about to step.
        route: ``"auto"`` uses the kernel of a fused optimizer, which must own exactly the
            parameters of the decision; ``"gradients"`` always writes the gradients.

    Raises:
        ValueError: If the rule limits the update and there is no optimizer.

    Example:
        >>> from lightning_bigopt.gradients import ClipContext, NormClip
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> context = ClipContext(parameters=[("weight", weight)])
        >>> apply_(NormClip(max_norm=1.0).decide(context, {}))
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """
    if optimizer is not None:
        clear_(optimizer)
    _apply(decision, optimizer, optimizer if route == "auto" else None)


def _apply(decision: ClipDecision, optimizer: Optimizer | None, fused: Optimizer | None) -> None:
    norms, coefficient = decision.norms, decision.coefficient
    if norms is not None and coefficient is not None and not _changes_nothing(norms, coefficient):
        if fused is not None and takes_grad_scale(fused):
            step_control(fused).scale_gradients(coefficient, norms.finite)
        else:
            scale_([parameter.grad for parameter in norms.parameters], coefficient)
    if norms is not None and decision.coefficients is not None:
        scale_([parameter.grad for parameter in norms.parameters], decision.coefficients)
    if decision.write_gradients is not None:
        decision.write_gradients()
    if decision.after_step is not None:
        if optimizer is None:
            raise ValueError(
                "optimizer must be given to a rule that limits the update, got None; pass the "
                "optimizer that is about to step"
            )
        step_control(optimizer).after_step(decision.after_step)
    for part in decision.by_pattern.values():
        _apply(part, optimizer, None)  # a kernel takes one scale for all parameters


def _changes_nothing(norms: GradientNorms, coefficient: Tensor) -> bool:
    """Returns whether gradients are finite and the coefficient is 1; False if that is unknown."""
    # Worth a check on the CPU: without grad_scale a fused kernel does not write the gradients back.
    # Non-finite gradients need the kernel's found_inf even with a coefficient of 1.
    return norms.is_on_host and coefficient.item() == 1.0 and math.isfinite(norms.value)


@torch.no_grad()
def scale_(gradients: Sequence[Tensor | None], coefficient: Tensor) -> None:
    """Multiplies gradients in place with multi-tensor kernels. Does not synchronize.

    Args:
        gradients: Dense tensors, including DTensors, and sparse ones; None is skipped.
        coefficient: Shape ``()`` for one factor, or ``(n,)`` for one factor per gradient; on any
            device.

    Example:
        >>> gradients = [torch.ones(2), torch.ones(1)]
        >>> scale_(gradients, torch.tensor([0.5, 0.25]))
        >>> gradients
        [tensor([0.5000, 0.5000]), tensor([0.2500])]
    """
    is_single = coefficient.ndim == 0
    # On the CPU reading the coefficients costs nothing, and gradients with factor 1 are skipped.
    is_read = coefficient.is_cpu
    if is_read and (coefficient.item() == 1.0 if is_single else bool((coefficient == 1).all())):
        return
    each = None if is_single else coefficient.unbind()
    numbers = coefficient.tolist() if is_read and not is_single else None
    # A multi-tensor kernel needs tensors of one device and dtype; a mix takes a slow path in torch,
    # one kernel per tensor.
    kinds: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for index, gradient in enumerate(gradients):
        if gradient is None or (numbers is not None and numbers[index] == 1.0):
            continue
        if gradient.is_sparse:
            factor = coefficient if each is None else each[index]
            gradient.mul_(factor.to(gradient.device, non_blocking=True))
            continue
        local = to_local(gradient)
        tensors, factors = kinds.setdefault((local.device, local.dtype), ([], []))
        tensors.append(local)
        if each is not None:
            factors.append(each[index])
    for (device, _), (tensors, factors) in kinds.items():
        if is_single:
            torch._foreach_mul_(tensors, coefficient.to(device, non_blocking=True))
        else:
            moved = [factor.to(device, non_blocking=True) for factor in factors]
            torch._foreach_mul_(tensors, moved)


def clear_(optimizer: Optimizer) -> None:
    """Removes scales, skips and functions that are pending for the next step of an optimizer.

    Needed if a step may not be made after :func:`apply_`, as when a GradScaler skips it.
    :func:`apply_` and ``skip_update_`` call this function first.

    Example:
        >>> clear_(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]))
    """
    control = installed_step_control(optimizer)
    if control is not None:
        control.clear()
        # A GradScaler does not remove its own tensors if the step raised.
        vars(control.optimizer).pop("grad_scale", None)
        vars(control.optimizer).pop("found_inf", None)


def after_step_once(optimizer: Optimizer, run: Callable[[], None]) -> None:
    """Runs a function after the next step. Deprecated.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> step_control(optimizer).after_step(lambda: print("stepped"))
        >>> optimizer.step()
        stepped
    """
    warnings.warn(
        "after_step_once is deprecated; write step_control(optimizer).after_step(run)",
        DeprecationWarning,
        stacklevel=2,
    )
    step_control(optimizer).after_step(run)
