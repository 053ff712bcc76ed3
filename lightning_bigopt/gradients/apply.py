"""Carries a decision out: inside a fused optimizer's own kernel, or in one pass over gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_bigopt.gradients.sharding import local_part

if TYPE_CHECKING:
    from lightning_bigopt.gradients.norms import GradientNorms
    from lightning_bigopt.gradients.rules.base import ClipDecision

__all__ = [
    "after_step_once",
    "apply_",
    "clear_",
    "scale_",
    "takes_grad_scale",
    "while_stepping",
]

_PENDING = "_bigopt_pending"  # on the optimizer itself: neither copies nor pickles take it along


def takes_grad_scale(optimizer: Optimizer) -> bool:
    """Whether every parameter group is updated by a fused kernel that scales gradients itself.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> takes_grad_scale(torch.optim.AdamW([weight], fused=True))
        True
        >>> takes_grad_scale(torch.optim.AdamW([weight]))
        False
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and all(
        group.get("fused") for group in optimizer.param_groups
    )


def apply_(
    decision: ClipDecision,
    *,
    optimizer: Optimizer | None = None,
    route: Literal["auto", "gradients"] = "auto",
) -> None:
    """Carries out what a rule decided. Does not synchronize with the host.

    A single coefficient reaches a fused optimizer as ``grad_scale``, with ``found_inf`` beside
    it, so that an update from non-finite gradients is skipped: gradients keep their values until
    the step, whose kernel writes the clipped ones back. Everything else is one multi-tensor pass
    over the gradients. Where the coefficient lies on the CPU and is 1, nothing is written.

    Args:
        decision: What the rule decided.
        optimizer: The optimizer about to step.
        route: ``"auto"`` uses a fused optimizer's kernel, for which the optimizer must own exactly
            the parameters decided on; ``"gradients"`` always writes the gradients.

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
    _carry_out(decision, optimizer, optimizer if route == "auto" else None)


def _carry_out(
    decision: ClipDecision, optimizer: Optimizer | None, scaler: Optimizer | None
) -> None:
    norms, coefficient = decision.norms, decision.coefficient
    if norms is not None and coefficient is not None and not _leaves_all(norms, coefficient):
        if scaler is not None and takes_grad_scale(scaler):
            _scale_in_kernel(scaler, coefficient, norms.finite)
        else:
            scale_([parameter.grad for parameter in norms.parameters], coefficient)
    if norms is not None and decision.coefficients is not None:
        scale_([parameter.grad for parameter in norms.parameters], decision.coefficients)
    if decision.write is not None:
        decision.write()
    if decision.after_step is not None:
        if optimizer is None:
            raise ValueError(
                "optimizer must be given to a rule that limits the update, got None; pass the "
                "optimizer that is about to step"
            )
        after_step_once(optimizer, decision.after_step)
    for part in decision.parts.values():
        _carry_out(part, optimizer, None)  # a kernel takes one scale for all parameters


def _leaves_all(norms: GradientNorms, coefficient: Tensor) -> bool:
    """Whether finite gradients stay as they are, as far as is known without a look at a device."""
    # Without a scale, a fused kernel need not write the gradients back.
    return norms.is_on_host and coefficient.item() == 1.0 and math.isfinite(norms.value)


@torch.no_grad()
def scale_(gradients: Sequence[Tensor | None], coefficient: Tensor) -> None:
    """Multiplies gradients in place with multi-tensor kernels. Does not synchronize.

    Args:
        gradients: Dense tensors, DTensors included; None is passed over.
        coefficient: 0-d for all, or shape (n,) with one for each; on any device.

    Example:
        >>> gradients = [torch.ones(2), torch.ones(1)]
        >>> scale_(gradients, torch.tensor([0.5, 0.25]))
        >>> gradients
        [tensor([0.5000, 0.5000]), tensor([0.2500])]
    """
    single = coefficient.ndim == 0
    # A CPU reads its own numbers for nothing, and a pass over the gradients is not nothing.
    idle = coefficient.is_cpu
    if idle and (coefficient.item() == 1.0 if single else bool((coefficient == 1).all())):
        return
    each = None if single else coefficient.unbind()
    keep = [1.0] * len(gradients) if single or not idle else coefficient.tolist()
    kinds: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for index, gradient in enumerate(gradients):
        if gradient is None or (not single and idle and keep[index] == 1.0):
            continue
        local = local_part(gradient)
        tensors, factors = kinds.setdefault((local.device, local.dtype), ([], []))
        tensors.append(local)
        if each is not None:
            factors.append(each[index])
    for (device, _), (tensors, factors) in kinds.items():
        if single:
            torch._foreach_mul_(tensors, coefficient.to(device, non_blocking=True))
        else:
            moved = [factor.to(device, non_blocking=True) for factor in factors]
            torch._foreach_mul_(tensors, moved)


def _scale_in_kernel(optimizer: Any, coefficient: Tensor, finite: Tensor) -> None:
    optimizer.grad_scale = coefficient.reciprocal()
    if not (finite.is_cpu and finite.item()):
        optimizer.found_inf = finite.logical_not().float()
    ours = getattr(optimizer, "found_inf", None)

    def clear() -> None:
        # A GradScaler puts a found_inf of its own in place of ours, and deletes both itself.
        if getattr(optimizer, "found_inf", None) is ours:
            _forget(optimizer)

    after_step_once(optimizer, clear)


def after_step_once(optimizer: Optimizer, run: Callable[[], None]) -> None:
    """Runs a function after the coming step, and only then.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> after_step_once(optimizer, lambda: print("stepped"))
        >>> for _ in range(2):
        ...     optimizer.step()
        stepped
    """
    due = [run]

    def once(*_: Any) -> None:
        _retire(handle, waiting)
        while due:
            due.pop()()

    handle = optimizer.register_step_post_hook(once)
    waiting = _waiting(optimizer)
    waiting.append(handle)


def while_stepping(optimizer: Optimizer, run: Callable[[], None]) -> None:
    """Runs a function at every end of the coming step.

    A subclass whose ``step`` calls that of its parent has two ends, and the function runs at both;
    it must bear that. The beginning of the step after puts an end to it.
    """
    ended = False

    def end(*_: Any) -> None:
        nonlocal ended
        ended = True
        run()

    def begin(*_: Any) -> None:
        if ended and at_end in waiting:
            at_end.remove()
            waiting.remove(at_end)
        if ended:
            _retire(at_beginning, waiting)

    at_end = optimizer.register_step_post_hook(end)
    at_beginning = optimizer.register_step_pre_hook(begin)
    waiting = _waiting(optimizer)
    waiting.extend((at_end, at_beginning))


def _waiting(optimizer: Optimizer) -> list[RemovableHandle]:
    """The handles of hooks that wait for a step."""
    waiting: list[RemovableHandle] = optimizer.__dict__.setdefault(_PENDING, [])
    return waiting


def _retire(handle: RemovableHandle, waiting: list[RemovableHandle]) -> None:
    """Removes the hook that is running, unless others are to run after it.

    The optimizer goes through a dict of hooks, which may lose its last entry meanwhile and no
    other. A hook that has to stay does nothing more, and goes with the next :func:`clear_`.
    """
    hooks = handle.hooks_dict_ref()
    if hooks is not None and handle in waiting and next(reversed(hooks)) == handle.id:
        handle.remove()
        waiting.remove(handle)


def clear_(optimizer: Optimizer) -> None:
    """Takes back what waits for a step that never came.

    Needed where a step may be left out after :func:`apply_`, as a GradScaler does on overflow;
    :func:`apply_` and ``skip_update_`` begin with it.

    Example:
        >>> clear_(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]))
    """
    for handle in optimizer.__dict__.pop(_PENDING, ()):
        handle.remove()
    _forget(optimizer)


def _forget(optimizer: Optimizer) -> None:
    optimizer.__dict__.pop("grad_scale", None)
    optimizer.__dict__.pop("found_inf", None)
