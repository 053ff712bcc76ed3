"""EMA: the exponential moving average of the weights, whose decay follows the clock."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.averaging.average import Average, AverageState
from lightning_bigopt.averaging.weights import lerp_
from lightning_bigopt.checks import shown
from lightning_bigopt.durations.duration import Duration, DurationLike
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.durations.progress import Progress

__all__ = ["EMA"]


@explain_arguments
@dataclass(frozen=True)
class EMA(Average):
    r"""Exponential moving average of the weights.

    An update that consumes :math:`\Delta` multiplies the weight of all earlier ones by the decay
    :math:`d = 2^{-\Delta / h}`. The average is the weighted mean of the weights since ``start``,

    .. math::

        \bar\theta_n = \frac{\sum_{i \le n} w_i \theta_i}{\sum_{i \le n} w_i}, \qquad
        w_i = (1 - d_i) \prod_{i < j \le n} d_j ,

    so that the initial weights have no part in it (the bias correction of Adam). After many
    half-lives it approaches the usual recursion :math:`\bar\theta \leftarrow d \bar\theta +
    (1 - d) \theta`. A half-life in samples or tokens covers the same data if the batch grows.

    Args:
        half_life: Duration :math:`h` in which the weight of an update halves, positive.
        start: Duration before the first update that is averaged. Until then the average is the
            current weights.

    Raises:
        ValueError: If ``half_life`` is zero, or an argument is no duration.

    Example:
        >>> import torch
        >>> from lightning_bigopt.durations import Progress
        >>> ema, state = EMA(half_life=1), AverageState()
        >>> for step, weight in enumerate((0.0, 3.0, 6.0), 1):
        ...     progress = Progress(fraction=step / 3, steps=step)
        ...     ema.update(state, {"w": torch.tensor([weight])}, progress, None)
        >>> ema.value(state, {}, progress)["w"].tolist()  # (0 · 1 + 3 · 2 + 6 · 4) / 7
        [4.285714149475098]

    References:
        Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992;
        Kingma & Ba, "Adam", ICLR 2015, Sec. 3 (the bias correction) and 7.2 (averaging).
    """

    half_life: DurationLike
    start: DurationLike = 0

    def __post_init__(self) -> None:
        if not Duration.parse(self.half_life, name="half_life").value:
            raise ValueError(
                f"half_life must be positive, got {shown(self.half_life)}; write '1%' or 100"
            )
        Duration.parse(self.start, name="start")

    @property
    def duration(self) -> Duration:
        """The half-life."""
        return Duration.parse(self.half_life)

    @property
    def durations(self) -> tuple[Duration, ...]:
        """The half-life, and the start if there is one."""
        start = Duration.parse(self.start)
        return (self.duration, start) if start.value else (self.duration,)

    def update(
        self,
        state: AverageState,
        weights: Mapping[str, Tensor],
        progress: Progress,
        horizon: Horizon | None,
    ) -> None:
        """Adds the weights after an update; the first ones are copied."""
        numbers, now = state.numbers, progress.consumed(self.duration.unit)
        consumed = now - numbers.get("consumed", 0.0)
        numbers["consumed"] = now
        start = Duration.parse(self.start)
        if progress.consumed(start.unit) <= start.value and start.value:
            return
        if not state.copies:
            state.copies.append({name: weights[name].clone() for name in weights})
        mass = numbers.get("mass", 0.0)
        # 1 - decay, exact for the small amounts of an update.
        share = -math.expm1(-max(consumed, 0.0) / self.duration.value * math.log(2))
        mass += share * (1.0 - mass)
        numbers["mass"] = mass
        if mass:
            lerp_(state.copies[0], weights, share / mass)

    def value(
        self, state: AverageState, weights: Mapping[str, Tensor], progress: Progress
    ) -> Mapping[str, Tensor] | None:
        """Returns the average; None before ``start``."""
        return state.copies[0] if state.copies else None

    def count_from(self, state: AverageState, progress: Progress) -> None:
        """Counts the next update from ``progress`` on."""
        state.numbers["consumed"] = progress.consumed(self.duration.unit)
