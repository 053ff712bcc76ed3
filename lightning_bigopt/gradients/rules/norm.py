"""Fixed limits on norms: of all gradients together, or of each."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace

from lightning_bigopt.durations import Horizon
from lightning_bigopt.gradients.measuring import check_norm_type
from lightning_bigopt.gradients.rules.base import (
    ClipContext,
    ClipDecision,
    ClippingRule,
    RuleState,
    check_positive,
    clip_coefficient,
    total_coefficient,
)
from lightning_bigopt.schedules import Schedule

__all__ = ["NormClip", "PerParameterNormClip"]


@dataclass(frozen=True)
class NormClip(ClippingRule):
    r"""Scales all gradients together so that their global norm is at most ``max_norm``.

    .. math:: g \leftarrow g \cdot \min\bigl(1,\; c / (\lVert g \rVert + 10^{-6})\bigr)

    Needs no host synchronization. Keeps no state.

    Args:
        max_norm: The limit :math:`c`, positive.
        norm_type: 1, 2 or ``inf``.
        schedule: Factor on ``max_norm`` over the budget; None for 1 throughout. The scheduled
            limit must stay positive.

    Raises:
        ValueError: If ``max_norm`` is not positive and finite, or ``norm_type`` is not supported.

    Example:
        >>> NormClip(max_norm=1.0)
        NormClip(max_norm=1.0, norm_type=2.0, schedule=None)

    References:
        Pascanu et al., "On the difficulty of training recurrent neural networks", ICML 2013.
    """

    max_norm: float = 1.0
    _: KW_ONLY
    norm_type: float = 2.0
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        check_positive("max_norm", self.max_norm, hint="; leave the rule out to clip nothing")
        check_norm_type(self.norm_type)

    @property
    def measures(self) -> float:
        """The order of the norm that it wants measured."""
        return self.norm_type

    def resolve(self, horizon: Horizon) -> NormClip:
        """The rule with its schedule resolved on a horizon."""
        if self.schedule is None:
            return self
        return replace(self, schedule=self.schedule.resolve(horizon))

    def decide(self, context: ClipContext, state: RuleState) -> ClipDecision:
        """One coefficient for all gradients; does not synchronize."""
        limit = self.max_norm
        if self.schedule is not None:
            limit = self.schedule.value(context.fraction, self.max_norm)
            check_positive("schedule × max_norm", limit, hint=f" at fraction {context.fraction:g}")
        norms = context.norms_of_type(self.norm_type)
        return ClipDecision(
            norms=norms,
            coefficient=total_coefficient(norms, limit),
            threshold=limit,
        )


@dataclass(frozen=True)
class PerParameterNormClip(ClippingRule):
    r"""Scales each gradient by itself so that its norm is at most ``max_norm``.

    Changes the direction of the whole gradient. Needs no host synchronization, keeps no state.

    Args:
        max_norm: The limit for the norm of one parameter's gradient, positive.
        norm_type: 1, 2 or ``inf``.

    Raises:
        ValueError: If ``max_norm`` is not positive and finite, or ``norm_type`` is not supported.

    Example:
        >>> PerParameterNormClip(max_norm=0.1).max_norm
        0.1
    """

    max_norm: float = 1.0
    _: KW_ONLY
    norm_type: float = 2.0

    def __post_init__(self) -> None:
        check_positive("max_norm", self.max_norm)
        check_norm_type(self.norm_type)

    @property
    def measures(self) -> float:
        """The order of the norm that it wants measured."""
        return self.norm_type

    def decide(self, context: ClipContext, state: RuleState) -> ClipDecision:
        """One coefficient for each gradient; does not synchronize."""
        norms = context.norms_of_type(self.norm_type)
        return ClipDecision(
            norms=norms,
            coefficients=clip_coefficient(norms.per_tensor, self.max_norm),
            threshold=self.max_norm,
        )
