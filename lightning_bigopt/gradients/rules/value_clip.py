"""ValueClip: a fixed limit on every element of the gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import check_positive
from lightning_bigopt.gradients.clip_decision import ClipDecision
from lightning_bigopt.gradients.norm_kernels import stored_values
from lightning_bigopt.gradients.rules.clipping_rule import ClipContext, ClippingRule, RuleState
from lightning_bigopt.gradients.sharding import redistribute_like_parameter_, to_local

__all__ = ["ValueClip"]


@explain_arguments
@dataclass(frozen=True)
class ValueClip(ClippingRule):
    r"""Limits every element of every gradient to :math:`[-m, m]`.

    NaN stays NaN and an infinity becomes :math:`\pm m`, as with torch's ``clip_grad_value_``.
    Needs no host synchronization. Has no state.

    Args:
        max_abs: The limit :math:`m`, positive.

    Raises:
        ValueError: If ``max_abs`` is not positive and finite; at the first update if a gradient is
            complex.

    Example:
        >>> ValueClip(max_abs=0.5)
        ValueClip(max_abs=0.5)
    """

    max_abs: float = 1.0

    def __post_init__(self) -> None:
        check_positive("max_abs", self.max_abs)

    @property
    def norm_order(self) -> None:
        """None: the rule reads no norms."""
        return

    def decide(self, context: ClipContext, state: RuleState) -> ClipDecision:
        """Decides to clamp the gradients; does not synchronize."""
        named = context.with_gradients(sparse="allowed")
        parameters = [parameter for _, parameter in named]
        if any(parameter.is_complex() for parameter in parameters):
            name = next(name for name, parameter in named if parameter.is_complex())
            raise ValueError(
                f"the gradient of {name} must be real for ValueClip, got a complex one; use "
                "PerParameterNormClip"
            )
        return ClipDecision(
            write_gradients=lambda: _clamp_(parameters, self.max_abs), threshold=self.max_abs
        )


@torch.no_grad()
def _clamp_(parameters: list[nn.Parameter], limit: float) -> None:
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        gradient = redistribute_like_parameter_(parameter)
        if gradient.is_sparse:  # the limit holds for the sum of the values of a position
            parameter.grad = gradient = gradient.coalesce()
        local = to_local(stored_values(gradient))
        kinds.setdefault((local.device, local.dtype), []).append(local)
    for (_, dtype), tensors in kinds.items():
        bound = min(float(limit), torch.finfo(dtype).max)  # a larger one cannot be converted
        torch._foreach_clamp_min_(tensors, -bound)
        torch._foreach_clamp_max_(tensors, bound)
