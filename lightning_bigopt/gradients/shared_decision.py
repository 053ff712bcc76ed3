"""One clipping decision for the gradients of several optimizers that step one after another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_bigopt.gradients.apply import apply_
from lightning_bigopt.gradients.clip_decision import ClipDecision
from lightning_bigopt.gradients.gradient_norms import DeviceNorms, GradientNorms, HostNorms
from lightning_bigopt.gradients.norm_kernels import accumulation_dtype
from lightning_bigopt.gradients.rules.clipping_rule import ClippingRule
from lightning_bigopt.gradients.sharding import to_local
from lightning_bigopt.type_checks import check_instance

__all__ = ["SharedDecision", "check_rule", "joint_norms"]


def joint_norms(parts: Sequence[GradientNorms]) -> GradientNorms:
    """Combines the norms of the gradients of several optimizers. Does not synchronize.

    The total does not include an optimizer with a non-finite gradient, which makes no update, so
    that the gradients of the others are clipped. If no optimizer has finite gradients, the total is
    not finite.

    Args:
        parts: The norms for each optimizer, of the same order and without common parameters.

    Returns:
        The norms of all gradients.

    Example:
        >>> from lightning_bigopt.gradients import measure
        >>> a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        >>> a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
        >>> joint_norms([measure([("a", a)]), measure([("b", b)])]).value
        5.0
    """
    parts = [part for part in parts if part.names] or parts
    if len(parts) == 1:
        return parts[0]
    order = parts[0].norm_type
    if all(part.is_on_host for part in parts):
        parts = [part for part in parts if part.finite] or parts
        pairs = [pair for p in parts for pair in zip(p.names, p.parameters, strict=True)]
        numbers = [number for part in parts for number in part.per_tensor.tolist()]
        return HostNorms(pairs, numbers, order)
    device = next(part.total.device for part in parts if not part.is_on_host)
    totals = torch.stack([part.total.to(device, non_blocking=True) for part in parts])
    finite = torch.stack([part.finite.to(device, non_blocking=True) for part in parts])
    counted = torch.where(finite, totals, 0.0).to(accumulation_dtype(device))
    total = torch.where(finite.any(), torch.linalg.vector_norm(counted, order), math.inf)
    return DeviceNorms(
        names=tuple([name for part in parts for name in part.names]),
        per_tensor=torch.cat([part.per_tensor.to(device, non_blocking=True) for part in parts]),
        total=total.float(),
        finite=total < math.inf,
        norm_type=order,
        parameters=tuple([parameter for part in parts for parameter in part.parameters]),
    )


class _Mark(NamedTuple):
    """The gradient of a parameter when it was last seen, and its version."""

    name: str
    parameter: nn.Parameter
    gradient: Tensor | None
    version: int


class SharedDecision:
    """One decision of a rule, which is applied to each optimizer's gradients when it steps.

    Detects gradients that change before they are clipped, by the identity and the version of their
    tensors; the host does not read them.

    Args:
        decision: The decision on the joint norms, with one coefficient.
        parameters: Names and parameters of all optimizers.

    Example:
        >>> from lightning_bigopt.gradients import ClipContext, NormClip, measure
        >>> pairs = [("a", nn.Parameter(torch.zeros(1))), ("b", nn.Parameter(torch.zeros(1)))]
        >>> optimizers = [torch.optim.SGD([parameter], lr=1.0) for _, parameter in pairs]
        >>> pairs[0][1].grad, pairs[1][1].grad = torch.tensor([3.0]), torch.tensor([4.0])
        >>> decision = NormClip(max_norm=1.0).decide(ClipContext(parameters=pairs), {})
        >>> shared = SharedDecision(decision, pairs)
        >>> for pair, optimizer in zip(pairs, optimizers):
        ...     shared.check([pair])
        ...     _ = shared.clip_(optimizer, measure([pair]))
        >>> [round(parameter.grad.item(), 3) for _, parameter in pairs]
        [0.6, 0.8]
    """

    def __init__(
        self, decision: ClipDecision, parameters: Sequence[tuple[str, nn.Parameter]]
    ) -> None:
        self._decision = decision
        self._waiting = {id(parameter): _mark(name, parameter) for name, parameter in parameters}
        self._clipped: set[int] = set()

    def check(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Checks that all gradients which are not clipped yet are those of the decision.

        Args:
            parameters: Names and parameters of the optimizer that is about to step.

        Raises:
            ValueError: If a gradient has changed, or is new.
        """
        known = self._waiting.keys() | self._clipped
        changed = [mark.name for mark in self._waiting.values() if _is_changed(mark)]
        changed += [n for n, p in parameters if p.grad is not None and id(p) not in known]
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise ValueError(
                "gradients must not change between the steps of several optimizers with "
                f"GradientClipping(scope='all'), got another gradient of {changed[0]}{more} after "
                "the first step; run all backward passes before the first step and zero the "
                "gradients after the last one, or use scope='optimizer'"
            )

    def clip_(self, optimizer: Optimizer, norms: GradientNorms) -> ClipDecision:
        """Clips the gradients of one optimizer. Does not synchronize.

        Args:
            optimizer: The optimizer that is about to step.
            norms: The norms of its gradients.

        Returns:
            The decision for this optimizer.
        """
        waiting = [i for i, p in enumerate(norms.parameters) if id(p) in self._waiting]
        route: Literal["auto", "gradients"] = "auto"
        if len(waiting) < len(norms.parameters):
            # Another optimizer has the rest, too, and has clipped it. A kernel scales everything.
            norms, route = norms.select(waiting), "gradients"
        decision = replace(self._decision, norms=norms)
        apply_(decision, optimizer=optimizer, route=route)
        for parameter in norms.parameters:
            del self._waiting[id(parameter)]
            self._clipped.add(id(parameter))
        # Gradients that are views of one buffer (FSDP2, DDP with gradient_as_bucket_view) have one
        # version for all: clipping some of them has changed that of the others.
        self._waiting = {
            key: _mark(mark.name, mark.parameter) for key, mark in self._waiting.items()
        }
        return decision


def _mark(name: str, parameter: nn.Parameter) -> _Mark:
    gradient = parameter.grad
    if gradient is None:
        return _Mark(name, parameter, None, 0)
    # Writing a DTensor changes its own version or that of its local tensor; both only grow.
    version = gradient._version + to_local(gradient)._version  # noqa: SLF001
    return _Mark(name, parameter, gradient, version)


def _is_changed(mark: _Mark) -> bool:
    """Returns whether a parameter has another gradient than before; removing it is no change."""
    now = _mark(mark.name, mark.parameter)
    if now.gradient is None:
        return False
    return now.gradient is not mark.gradient or now.version != mark.version


def check_rule(rule: object, *, is_shared: bool) -> None:
    """Raises unless a value is a clipping rule, and one that several optimizers can share.

    Args:
        rule: The rule.
        is_shared: Whether one decision clips the gradients of several optimizers.

    Raises:
        ValueError: If ``rule`` is no rule, or a shared one has no coefficient for all gradients.
    """
    check_instance("rule", rule, ClippingRule, hint="try NormClip(max_norm=1.0)")
    if is_shared and not rule.uses_total_norm:  # type: ignore[attr-defined]
        raise ValueError(
            "rule must have one coefficient for all gradients with scope='all', got "
            f"{type(rule).__name__}; use NormClip, AutoClip or ZClip, or scope='optimizer' (a "
            "rule of your own sets uses_total_norm = True)"
        )
