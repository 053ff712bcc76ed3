"""Seesaw: half of every decay of the learning rate is left to the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

from lightning_bigopt.durations import Horizon
from lightning_bigopt.schedules.base import Schedule, check_schedule

__all__ = ["Seesaw"]

LOOKS = 1024
"""Moments at which the inner schedule is looked at for its peak, besides its own seams."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Seesaw(Schedule):
    r"""The learning-rate half of Seesaw: decays by the square root while the batch grows.

    Where the inner schedule :math:`s_0` would multiply the learning rate by :math:`\alpha`, the
    learning rate is multiplied by :math:`\sqrt\alpha` and the batch by :math:`1 / \alpha`. What the
    batch may not grow by any more, the learning rate falls by in full. With the peak :math:`P` of
    :math:`s_0` first reached at :math:`\tau_P` and the batch's cap :math:`c`,

    .. math::
        s(\tau) = \begin{cases}
            s_0(\tau) & \tau \le \tau_P \\ s_0(\tau) \sqrt{b(\tau)} & \text{else}
        \end{cases}
        \qquad
        b(\tau) = \begin{cases}
            1 & \tau \le \tau_P \\ \min(c, P / s_0(\tau)) & \text{else}
        \end{cases}

    so that a warm-up stays as it is. Updates are saved only under a budget in samples, tokens or
    epochs, which the growing batch spends faster.

    Args:
        schedule: The schedule :math:`s_0`; it may rise to its peak once and then only falls.
        max_batch_factor: The cap :math:`c` on the growth of the batch; at least 1 and finite.

    Raises:
        ValueError: If the schedule rises again after its peak (found when it is resolved), or is
            bounded in absolute terms: ``Clamp(Seesaw(...), unit="lr")`` is right; or if
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
        if not (math.isfinite(self.max_batch_factor) and self.max_batch_factor >= 1):
            raise ValueError(
                "max_batch_factor must be at least 1 and finite, got "
                f"{self.max_batch_factor!r}; write 8.0"
            )
        check_schedule("schedule", self.schedule)
        if self.schedule.needs_base:
            raise ValueError(
                f"schedule must not hold Clamp(unit='lr'), got {self.schedule!r}; put the bound "
                "around it: Clamp(Seesaw(...), unit='lr', ...)"
            )

    @cached_property
    def _peak(self) -> tuple[float, float]:
        """Where the inner schedule first reaches its peak, and the factor there."""
        grid = {look / LOOKS for look in range(LOOKS + 1)}
        moments = sorted(grid.union(self.schedule.boundaries().values()))
        factors = [self.schedule(moment) for moment in moments]
        height = max(factors)
        first = factors.index(height)
        lowest = height
        for moment, factor in zip(moments[first:], factors[first:], strict=True):
            if factor > lowest + 1e-9 * height:
                raise ValueError(
                    f"schedule must only fall after its peak, got {self.schedule!r}, which rises "
                    f"again before {moment:.1%} of the budget; a batch cannot shrink with it"
                )
            lowest = factor
        return moments[first], height

    def factor(self, fraction: float) -> float:
        """Follows the formula above; ``fraction`` in [0, 1]."""
        inner = self.schedule.factor(fraction)
        moment, height = self._peak
        if fraction <= moment:
            return inner
        if height <= inner * self.max_batch_factor:
            return math.sqrt(height * inner)
        return inner * math.sqrt(self.max_batch_factor)

    def batch_factor(self, fraction: float) -> float:
        """What the batch is multiplied by when ``fraction`` of the budget is spent.

        Args:
            fraction: Share of the budget spent, non-negative.

        Returns:
            From 1 to ``max_batch_factor``.

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
        """The same on a resolved inner schedule.

        Raises:
            ValueError: If that rises again after its peak.
        """
        resolved = self._changed(schedule=self.schedule.resolve(horizon))
        resolved(0.0)
        return resolved

    def boundaries(self) -> dict[str, float]:
        """The inner schedule's seams."""
        return self.schedule.boundaries()
