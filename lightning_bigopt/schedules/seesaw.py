"""Seesaw: decays the learning rate by the square root, while SeesawBatchSize grows the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import check_between, shown
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.schedules.base import Schedule, check_schedule

__all__ = ["Seesaw"]

GRID_POINTS = 1024
"""Intervals of the grid on which the peak is searched; boundaries of the schedule are added."""


@explain_arguments
@dataclass(frozen=True, kw_only=True, repr=False)
class Seesaw(Schedule):
    r"""The learning-rate half of Seesaw: decays by the square root while the batch grows.

    When the inner schedule :math:`s_0` would multiply the learning rate by :math:`\alpha`, the
    learning rate is multiplied by :math:`\sqrt\alpha` and the batch by :math:`1 / \alpha`. Once the
    batch has reached its cap, the learning rate falls by :math:`\alpha` again. With the peak
    :math:`P` of :math:`s_0` first reached at :math:`\tau_P` and the cap :math:`c` of the batch,

    .. math::
        s(\tau) = \begin{cases}
            s_0(\tau) & \tau \le \tau_P \\ s_0(\tau) \sqrt{b(\tau)} & \text{else}
        \end{cases}
        \qquad
        b(\tau) = \begin{cases}
            1 & \tau \le \tau_P \\ \min(c, P / s_0(\tau)) & \text{else}
        \end{cases}

    so that a warm-up stays unchanged. Updates are saved only with a budget in samples, tokens or
    epochs, which a growing batch consumes faster.

    Args:
        schedule: The schedule :math:`s_0`; it may rise to one peak and must not rise after it.
        max_batch_factor: The cap :math:`c` on the growth of the batch; at least 1 and finite.

    Raises:
        ValueError: If the schedule rises again after its peak (found when it is resolved), or
            ``max_batch_factor`` is below 1 or infinite.

    Example:
        >>> from lightning_bigopt.schedules import Linear
        >>> seesaw = Seesaw(Linear())
        >>> seesaw(0.75), seesaw.batch_factor(0.75)
        (0.5, 4.0)

    References:
        Meterez et al., "Seesaw: Accelerating Training by Balancing Learning Rate and Batch Size
        Scheduling", 2025 (arXiv:2510.14717), Alg. 1.
    """

    schedule: Schedule = field(kw_only=False)
    max_batch_factor: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_schedule("schedule", self.schedule)
        check_between(
            "max_batch_factor", self.max_batch_factor, 1, math.inf, ends="[)", hint="write 8.0"
        )

    @cached_property
    def _peak(self) -> tuple[float, float]:
        """Fraction at which the inner schedule first reaches its peak, and the factor there."""
        grid = {index / GRID_POINTS for index in range(GRID_POINTS + 1)}
        moments = sorted(grid.union(self.schedule.boundaries().values()))
        factors = [self.schedule(moment) for moment in moments]
        height = max(factors)
        first = factors.index(height)
        lowest = height
        for moment, factor in zip(moments[first:], factors[first:], strict=True):
            if factor > lowest + 1e-9 * height:  # more than a rounding error
                raise ValueError(
                    f"schedule must only fall after its peak, got {shown(self.schedule)}, which "
                    f"rises again before {moment:.1%} of the budget; the batch cannot shrink again"
                )
            lowest = factor
        return moments[first], height

    def factor(self, fraction: float) -> float:
        """Evaluates the formula above; ``fraction`` in [0, 1]."""
        inner = self.schedule.factor(fraction)
        moment, height = self._peak
        if fraction <= moment:
            return inner
        if height <= inner * self.max_batch_factor:
            return math.sqrt(height * inner)
        return inner * math.sqrt(self.max_batch_factor)

    def batch_factor(self, fraction: float) -> float:
        """Returns the factor :math:`b` on the batch size at a fraction of the budget.

        Args:
            fraction: Fraction of the budget consumed, non-negative.

        Returns:
            The factor, from 1 to ``max_batch_factor``.

        Example:
            >>> from lightning_bigopt.schedules import WarmupLinear
            >>> seesaw = Seesaw(WarmupLinear(warmup="50%"))
            >>> [seesaw.batch_factor(fraction) for fraction in (0.25, 0.5, 0.75, 1.0)]
            [1.0, 1.0, 2.0, 8.0]
        """
        inner = self.schedule(fraction)
        moment, height = self._peak
        if fraction <= moment or not height:
            return 1.0
        if height >= inner * self.max_batch_factor:
            return self.max_batch_factor
        return max(height / inner, 1.0)

    def resolve(self, horizon: Horizon) -> Schedule:
        """Resolves the inner schedule.

        Raises:
            ValueError: If a duration cannot be converted, or the schedule rises again after its
                peak.
        """
        resolved = self._changed(schedule=self.schedule.resolve(horizon))
        resolved(0.0)  # raises for a second rise before the training begins
        return resolved

    def boundaries(self) -> dict[str, float]:
        """Returns the boundaries of the inner schedule."""
        return self.schedule.boundaries()

    def warmup_end(self) -> float:
        """Returns the end of the inner schedule's warm-up."""
        return self.schedule.warmup_end()
