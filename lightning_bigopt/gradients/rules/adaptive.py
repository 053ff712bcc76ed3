"""Limits that follow the global norm's own history."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from lightning_bigopt.gradients.rules.base import (
    ClipContext,
    ClipDecision,
    ClippingRule,
    RuleState,
    check_between,
    check_count,
    check_positive,
    total_coefficient,
)

__all__ = ["AutoClip", "ZClip"]


@dataclass(frozen=True)
class AutoClip(ClippingRule):
    """Clips the global norm to a percentile of the norms so far, the current one included.

    The paper keeps every norm; here a window of the last ones is kept, so that the limit can
    follow a norm that grows and the checkpoint stays small. Reads one number from the device
    each update. State: ``norms``, the window, and ``ordered``, the same numbers by size; norms that
    are zero (which would silence every later gradient) or not finite never enter it.

    Args:
        percentile: Between 0 and 100, interpolated linearly between two norms.
        window: How many norms are kept.

    Raises:
        ValueError: If ``percentile`` is not in (0, 100] or ``window`` is not a positive integer.

    Example:
        >>> AutoClip(percentile=10)
        AutoClip(percentile=10, window=1000)

    References:
        Seetharaman et al., "AutoClip: Adaptive gradient clipping for source separation
        networks", MLSP 2020.
    """

    percentile: float = 10.0
    _: KW_ONLY
    window: int = 1000

    def __post_init__(self) -> None:
        if isinstance(self.percentile, bool) or not 0 < self.percentile <= 100:
            raise ValueError(f"percentile must be in (0, 100], got {self.percentile!r}")
        check_count("window", self.window)

    def initial_state(self) -> RuleState:
        """An empty window."""
        return {"norms": [], "ordered": []}

    def decide(self, context: ClipContext, state: RuleState) -> ClipDecision:
        """One coefficient for all gradients; reads one number from the device."""
        norms = context.norms_of_type(2.0)
        if math.isfinite(norms.value) and norms.value > 0:
            self._take(norms.value, state)
        ordered: list[float] = state["ordered"]
        limit = percentile(ordered, self.percentile) if ordered else math.inf
        return ClipDecision(
            norms=norms,
            coefficient=total_coefficient(norms, limit),
            threshold=limit,
        )

    def _take(self, norm: float, state: RuleState) -> None:
        """A norm enters the window, and the oldest leaves a full one."""
        history: list[float] = state["norms"]
        ordered: list[float] = state["ordered"]
        history.append(norm)
        insort(ordered, norm)
        for old in history[: -self.window]:
            del ordered[bisect_left(ordered, old)]
        del history[: -self.window]


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The percentile of numbers in ascending order, interpolated linearly.

    Example:
        >>> percentile([1.0, 2.0, 3.0, 4.0], 50)
        2.5
    """
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True)
class ZClip(ClippingRule):
    r"""Clips norms that are outliers against a moving mean and variance of the norms.

    .. math::
        z = \frac{\lVert g\rVert - \mu}{\sigma + 10^{-6}}, \qquad
        c = \begin{cases} \mu + z_0^2\,\sigma / z & z > z_0 \\ \lVert g\rVert & \text{otherwise}
        \end{cases}

    The moments take in :math:`c`, the variance with the mean already moved, and the norm is then
    limited to :math:`\min(c, \text{max\_norm})`. The first ``warmup`` norms seed mean and
    population variance; until then only ``max_norm`` acts. Reads one number from the device each
    update. State: ``seed`` (the first norms), ``mean``, ``variance``; norms that are zero (a seed
    of zeros would silence every later gradient) or not finite never enter it.

    Args:
        z_threshold: :math:`z_0`, in standard deviations, positive.
        alpha: Share of the old value in the moving averages, in (0, 1).
        warmup: How many norms seed the moments.
        max_norm: A fixed limit besides; None for none.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> ZClip()
        ZClip(z_threshold=2.5, alpha=0.97, warmup=25, max_norm=1.0)

    References:
        Kumar et al., "ZClip: Adaptive spike mitigation for LLM pre-training", arXiv:2504.02507.
    """

    z_threshold: float = 2.5
    _: KW_ONLY
    alpha: float = 0.97
    warmup: int = 25
    max_norm: float | None = 1.0

    def __post_init__(self) -> None:
        check_positive("z_threshold", self.z_threshold)
        check_between("alpha", self.alpha, low=0, high=1)
        check_count("warmup", self.warmup)
        if self.max_norm is not None:
            check_positive("max_norm", self.max_norm, hint="; None for no fixed limit")

    def initial_state(self) -> RuleState:
        """No norms, no moments."""
        return {"seed": [], "mean": 0.0, "variance": 0.0}

    def decide(self, context: ClipContext, state: RuleState) -> ClipDecision:
        """One coefficient for all gradients; reads one number from the device."""
        norms = context.norms_of_type(2.0)
        fixed = math.inf if self.max_norm is None else self.max_norm
        limit, threshold = self._limit(norms.value, state)
        return ClipDecision(
            norms=norms,
            coefficient=total_coefficient(norms, min(limit, fixed)),
            threshold=min(threshold, fixed),
        )

    def _limit(self, norm: float, state: RuleState) -> tuple[float, float]:
        """The limit for this norm and the one from which on it acts; the moments move on."""
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
        mean = self.alpha * mean + (1 - self.alpha) * clipped
        variance = self.alpha * state["variance"] + (1 - self.alpha) * (clipped - mean) ** 2
        state["mean"], state["variance"] = mean, variance
        return (clipped, clipped) if is_outlier else (math.inf, threshold)
