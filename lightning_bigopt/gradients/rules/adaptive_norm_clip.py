"""AutoClip and ZClip: limits on the global norm that follow its history."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import check_between, check_count, check_positive
from lightning_bigopt.gradients.clip_decision import ClipDecision
from lightning_bigopt.gradients.rules.clipping_rule import (
    ClipContext,
    ClippingRule,
    RuleState,
    total_coefficient,
)

__all__ = ["AutoClip", "ZClip", "percentile"]


@explain_arguments
@dataclass(frozen=True)
class AutoClip(ClippingRule):
    """Clips the global norm to a percentile of the previous norms and the current one.

    The paper uses all norms. This rule uses the last ``window`` norms, so that the limit follows a
    changing norm and checkpoints stay small. Synchronizes once per update. State: ``norms``, the
    last norms, and ``ordered``, the same norms in ascending order. Norms of zero, which would set
    all later gradients to zero, and non-finite norms never enter it.

    Args:
        percentile: Between 0 and 100, interpolated linearly between two norms.
        window: Number of norms in the history.

    Raises:
        ValueError: If ``percentile`` is not in (0, 100] or ``window`` is not a positive integer.

    Example:
        >>> AutoClip(percentile=10)
        AutoClip(percentile=10, window=1000)

    References:
        Seetharaman et al., "AutoClip: Adaptive gradient clipping for source separation
        networks", MLSP 2020.
    """

    uses_total_norm: ClassVar[bool] = True

    percentile: float = 10.0
    _: KW_ONLY
    window: int = 1000

    def __post_init__(self) -> None:
        check_between("percentile", self.percentile, 0, 100, ends="(]")
        check_count("window", self.window)

    def initial_state(self) -> RuleState:
        """Returns an empty history."""
        return {"norms": [], "ordered": []}

    def decide(self, context: ClipContext, state: RuleState) -> ClipDecision:
        """Decides on one coefficient for all gradients. Synchronizes once."""
        norms = context.norms_of_type(2.0)
        if math.isfinite(norms.value) and norms.value > 0:
            # Before the percentile, which includes the current norm, as in the paper.
            self._add_norm(norms.value, state)
        ordered: list[float] = state["ordered"]
        limit = percentile(ordered, self.percentile) if ordered else math.inf
        return ClipDecision(
            norms=norms,
            coefficient=total_coefficient(norms, limit),
            threshold=limit,
        )

    def _add_norm(self, norm: float, state: RuleState) -> None:
        history: list[float] = state["norms"]
        ordered: list[float] = state["ordered"]
        history.append(norm)
        # Insertion and bisection keep this copy sorted: a percentile then takes two lookups.
        insort(ordered, norm)
        for old in history[: -self.window]:
            del ordered[bisect_left(ordered, old)]
        del history[: -self.window]


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Returns a percentile of numbers in ascending order, interpolated linearly.

    Example:
        >>> percentile([1.0, 2.0, 3.0, 4.0], 50)
        2.5
    """
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@explain_arguments
@dataclass(frozen=True)
class ZClip(ClippingRule):
    r"""Clips norms that are outliers against a moving mean and variance of the norms.

    .. math::
        z = \frac{\lVert g\rVert - \mu}{\sigma + 10^{-6}}, \qquad
        c = \begin{cases} \mu + z_0^2\,\sigma / z & z > z_0 \\ \lVert g\rVert & \text{otherwise}
        \end{cases}

    Mean and variance are updated with :math:`c`, the variance with the new mean. The norm is then
    limited to :math:`\min(c, \text{max\_norm})`. The first ``warmup`` norms give the initial mean
    and population variance; until then only ``max_norm`` applies. Synchronizes once per update.
    State: ``seed`` (the first norms), ``mean``, ``variance``. Norms of zero, which as a seed would
    set all later gradients to zero, and non-finite norms never enter it.

    Args:
        z_threshold: :math:`z_0`, in standard deviations, positive.
        alpha: Weight of the old value in the moving averages, in (0, 1).
        warmup: Number of norms for the initial mean and variance.
        max_norm: An additional fixed limit; None for no limit.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> ZClip()
        ZClip(z_threshold=2.5, alpha=0.97, warmup=25, max_norm=1.0)

    References:
        Kumar et al., "ZClip: Adaptive spike mitigation for LLM pre-training", arXiv:2504.02507.
    """

    uses_total_norm: ClassVar[bool] = True

    z_threshold: float = 2.5
    _: KW_ONLY
    alpha: float = 0.97
    warmup: int = 25
    max_norm: float | None = 1.0

    def __post_init__(self) -> None:
        check_positive("z_threshold", self.z_threshold)
        check_between("alpha", self.alpha, 0, 1)
        check_count("warmup", self.warmup)
        if self.max_norm is not None:
            check_positive("max_norm", self.max_norm, hint="None for no fixed limit")

    def initial_state(self) -> RuleState:
        """Returns the state without any norms."""
        return {"seed": [], "mean": 0.0, "variance": 0.0}

    def decide(self, context: ClipContext, state: RuleState) -> ClipDecision:
        """Decides on one coefficient for all gradients. Synchronizes once."""
        norms = context.norms_of_type(2.0)
        fixed = math.inf if self.max_norm is None else self.max_norm
        limit, threshold = self._limit(norms.value, state)
        return ClipDecision(
            norms=norms,
            coefficient=total_coefficient(norms, min(limit, fixed)),
            threshold=min(threshold, fixed),
        )

    def _limit(self, norm: float, state: RuleState) -> tuple[float, float]:
        """Returns the limit for a norm and the threshold above which it acts; updates the state."""
        # The second number is logged. For an outlier it is the limit itself, which is below the
        # threshold and falls as z grows.
        seed: list[float] = state["seed"]
        if len(seed) < self.warmup:
            if math.isfinite(norm) and norm > 0:
                seed.append(norm)
            if len(seed) == self.warmup:
                mean = math.fsum(seed) / len(seed)
                state["mean"] = mean
                state["variance"] = math.fsum((x - mean) ** 2 for x in seed) / len(seed)
            return math.inf, math.inf
        mean, deviation = state["mean"], math.sqrt(state["variance"])
        threshold = mean + self.z_threshold * (deviation + 1e-6)
        if not (math.isfinite(norm) and norm > 0):
            return math.inf, threshold
        z = (norm - mean) / (deviation + 1e-6)
        is_outlier = z > self.z_threshold
        clipped = mean + self.z_threshold**2 * deviation / z if is_outlier else norm
        # The averages follow the clipped norm, or a single spike would raise them for a long time.
        mean = self.alpha * mean + (1 - self.alpha) * clipped
        variance = self.alpha * state["variance"] + (1 - self.alpha) * (clipped - mean) ** 2
        state["mean"], state["variance"] = mean, variance
        return (clipped, clipped) if is_outlier else (math.inf, threshold)
