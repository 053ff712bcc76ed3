"""AdaGC: limits the norm of each gradient relative to its own history."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import check_between, check_count, check_positive
from lightning_bigopt.gradients.clip_decision import ClipDecision
from lightning_bigopt.gradients.gradient_norms import GradientNorms
from lightning_bigopt.gradients.rules.clipping_rule import (
    ClipContext,
    ClippingRule,
    RuleState,
    total_coefficient,
)

__all__ = ["AdaGC"]


@explain_arguments
@dataclass(frozen=True)
class AdaGC(ClippingRule):
    r"""Limits each gradient relative to a moving average of its own clipped norms.

    During ``warmup`` updates the global norm is limited to ``max_norm`` and
    :math:`\gamma_i \leftarrow \min(\gamma_i, \lVert \hat g_i \rVert)`; afterwards

    .. math::
        \hat g_i = g_i \min(1, \lambda \gamma_i / \lVert g_i \rVert), \qquad
        \gamma_i \leftarrow \beta \gamma_i + (1 - \beta) \lVert \hat g_i \rVert.

    Needs no host synchronization. State: ``updates``, ``names``, ``gamma`` of shape ``(n,)``. Norms
    of zero, which would set all later gradients of a parameter to zero, and non-finite norms never
    enter it.

    Args:
        relative: :math:`\lambda`, at least 1.
        beta: Weight of the old value in the moving average, in (0, 1).
        warmup: Number of updates in which the global norm is limited.
        max_norm: Limit of the global norm in these updates.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> AdaGC()
        AdaGC(relative=1.05, beta=0.98, warmup=100, max_norm=1.0)

    References:
        Wang et al., "AdaGC: Improving training stability for large language model pretraining",
        arXiv:2502.11034.
    """

    relative: float = 1.05
    _: KW_ONLY
    beta: float = 0.98
    warmup: int = 100
    max_norm: float = 1.0

    def __post_init__(self) -> None:
        check_between("relative", self.relative, 1, math.inf, ends="[)")
        check_between("beta", self.beta, 0, 1)
        check_count("warmup", self.warmup)
        check_positive("max_norm", self.max_norm)

    def initial_state(self) -> RuleState:
        """Returns the state without any parameters."""
        return {"updates": 0, "names": [], "gamma": torch.zeros(0)}

    def forget(self, names: Collection[str], state: RuleState) -> None:
        """Removes gamma of replaced parameters, which start again with their first norm."""
        kept = [index for index, name in enumerate(state["names"]) if name not in names]
        state["names"] = [state["names"][index] for index in kept]
        state["gamma"] = state["gamma"][kept]

    @torch.no_grad()
    def decide(self, context: ClipContext, state: RuleState) -> ClipDecision:
        """Decides on one coefficient for all, then on one for each; does not synchronize."""
        norms = context.norms_of_type(2.0)
        gamma, each = _gamma_of(state, norms), norms.per_tensor
        state["updates"] += 1
        if state["updates"] <= self.warmup:
            coefficient = total_coefficient(norms, self.max_norm)
            smallest = gamma.minimum(each * coefficient)
            _store_gamma(state, norms, torch.where(_is_usable(each), smallest, gamma))
            return ClipDecision(norms=norms, coefficient=coefficient, threshold=self.max_norm)
        limit = float(self.relative) * gamma
        coefficients = torch.where(_is_usable(each), (limit / each).clamp(max=1.0), 1.0)
        clipped = each * coefficients
        # A parameter without a gradient during the warm-up starts with its first norm.
        moved = torch.where(
            gamma.isfinite(), self.beta * gamma + (1 - self.beta) * clipped, clipped
        )
        _store_gamma(state, norms, torch.where(_is_usable(each), moved, gamma))
        return ClipDecision(norms=norms, coefficients=coefficients, threshold=limit)


def _is_usable(norms: Tensor) -> Tensor:
    return norms.isfinite() & (norms > 0)


def _gamma_of(state: RuleState, norms: GradientNorms) -> Tensor:
    """Returns gamma in the order of the norms; ``inf`` for a new parameter."""
    device = norms.per_tensor.device
    gamma: Tensor = state["gamma"].to(device)
    if state["names"] != list(norms.names):
        known = dict(zip(state["names"], gamma.unbind(), strict=True))
        missing = [name for name in norms.names if name not in known]
        new = torch.full((len(missing),), math.inf, device=device)
        known.update(zip(missing, new.unbind(), strict=True))
        state["names"], state["gamma"] = list(known), torch.cat([gamma, new])
        gamma = torch.stack([known[name] for name in norms.names]) if known else gamma
    return gamma


def _store_gamma(state: RuleState, norms: GradientNorms, gamma: Tensor) -> None:
    if state["names"] == list(norms.names):
        state["gamma"] = gamma
        return
    known = dict(zip(state["names"], state["gamma"].unbind(), strict=True))
    known.update(zip(norms.names, gamma.unbind(), strict=True))
    state["gamma"] = torch.stack(list(known.values()))
