"""NormClip and PerParameterNormClip: fixed limits on the global norm or on each norm."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import check_positive
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.gradients.clip_decision import ClipDecision
from lightning_bigopt.gradients.measure import check_norm_type
from lightning_bigopt.gradients.rules.clipping_rule import (
    ClipContext,
    ClippingRule,
    RuleState,
    clip_coefficient,
    total_coefficient,
)
from lightning_bigopt.schedules.base import Schedule
from lightning_bigopt.type_checks import check_instance

__all__ = ["NormClip", "PerParameterNormClip"]


@explain_arguments
@dataclass(frozen=True)
class NormClip(ClippingRule):
    r"""Scales all gradients together so that their global norm is at most ``max_norm``.

    .. math:: g \leftarrow g \cdot \min\bigl(1,\; c / (\lVert g \rVert + 10^{-6})\bigr)

    Needs no host synchronization. Has no state.

    Args:
        max_norm: The limit :math:`c`, positive.
        norm_type: Order of the norm: 1, 2 or ``inf``.
        schedule: Factor on ``max_norm`` over the budget; None for a constant limit. The scheduled
            limit must stay positive.

    Raises:
        ValueError: If ``max_norm`` is not positive and finite, or ``norm_type`` is not supported.

    Example:
        >>> NormClip(max_norm=1.0)
        NormClip(max_norm=1.0, norm_type=2.0, schedule=None)

    References:
        Pascanu et al., "On the difficulty of training recurrent neural networks", ICML 2013.
    """

    uses_total_norm: ClassVar[bool] = True

    max_norm: float = 1.0
    _: KW_ONLY
    norm_type: float = 2.0
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        check_positive("max_norm", self.max_norm, hint="remove the rule to disable clipping")
        check_norm_type(self.norm_type)
        if self.schedule is not None:
            check_instance("schedule", self.schedule, Schedule, hint="write Linear(end=0.1)")

    @property
    def norm_order(self) -> float:
        """The order of the norm."""
        return self.norm_type

    def resolve(self, horizon: Horizon) -> NormClip:
        """Returns the rule with its schedule resolved on a horizon."""
        if self.schedule is None:
            return self
        return replace(self, schedule=self.schedule.resolve(horizon))

    def decide(self, context: ClipContext, state: RuleState) -> ClipDecision:
        """Decides on one coefficient for all gradients; does not synchronize."""
        limit = self.max_norm
        if self.schedule is not None:
            limit = self.max_norm * self.schedule(context.fraction)
            hint = f"keep the schedule above 0, also at {context.fraction:.0%} of the budget"
            check_positive("schedule × max_norm", limit, hint=hint)
        norms = context.norms_of_type(self.norm_type)
        return ClipDecision(
            norms=norms,
            coefficient=total_coefficient(norms, limit),
            threshold=limit,
        )


@explain_arguments
@dataclass(frozen=True)
class PerParameterNormClip(ClippingRule):
    r"""Scales each gradient separately so that its norm is at most ``max_norm``.

    Changes the direction of the global gradient. Needs no host synchronization. Has no state.

    Args:
        max_norm: Limit of the norm of each gradient, positive.
        norm_type: Order of the norms: 1, 2 or ``inf``.

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
    def norm_order(self) -> float:
        """The order of the norms."""
        return self.norm_type

    def decide(self, context: ClipContext, state: RuleState) -> ClipDecision:
        """Decides on one coefficient for each gradient; does not synchronize."""
        norms = context.norms_of_type(self.norm_type)
        return ClipDecision(
            norms=norms,
            coefficients=clip_coefficient(norms.per_tensor, self.max_norm),
            threshold=self.max_norm,
        )
