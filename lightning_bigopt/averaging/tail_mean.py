"""TailMean: the uniform mean of the weights over the last part of a run."""

from __future__ import annotations

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

__all__ = ["TailMean"]

_ROUNDING = 1e-9  # of the budget, far less than one update


@explain_arguments
@dataclass(frozen=True)
class TailMean(Average):
    r"""Uniform mean of the weights after every update in the last part of the budget.

    .. math:: \bar\theta = \frac{1}{n} \sum_{i = T - n + 1}^{T} \theta_i

    Before that part begins, the average is the current weights. It needs one copy of the weights.
    If a resume or a second fit has another budget, the mean starts again.

    Args:
        over: Length of that part at the end of the budget, positive.

    Raises:
        ValueError: If ``over`` is zero or no duration; at train start if it cannot be converted to
            a fraction of the budget.

    Example:
        >>> import torch
        >>> from lightning_bigopt.durations import Horizon, Progress
        >>> mean, state = TailMean(over="50%"), AverageState()
        >>> for step, weight in enumerate((9.0, 9.0, 1.0, 2.0), 1):
        ...     progress = Progress(fraction=step / 4, steps=step)
        ...     mean.update(state, {"w": torch.tensor([weight])}, progress, Horizon.of_steps(4))
        >>> mean.value(state, {}, progress)["w"].tolist()
        [1.5]

    References:
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI
        2018, Sec. 3; Jain et al., "Parallelizing Stochastic Gradient Descent for Least Squares
        Regression: Mini-batching, Averaging, and Model Misspecification", JMLR 2018 (tail
        averaging).
    """

    over: DurationLike

    def __post_init__(self) -> None:
        if not Duration.parse(self.over, name="over").value:
            raise ValueError(f"over must be positive, got {shown(self.over)}; write '10%' or 500")

    @property
    def duration(self) -> Duration:
        """The length of the averaged part."""
        return Duration.parse(self.over)

    @property
    def needs_horizon(self) -> bool:
        """Returns True: the part ends with the budget."""
        return True

    def update(
        self,
        state: AverageState,
        weights: Mapping[str, Tensor],
        progress: Progress,
        horizon: Horizon | None,
    ) -> None:
        """Adds the weights if the update is in the averaged part."""
        assert horizon is not None  # needs_horizon
        begin = 1.0 - horizon.fraction(self.duration, stop=1.0, name="over")
        if progress.fraction <= begin + _ROUNDING:
            return
        count = state.numbers.get("count", 0) + 1
        state.numbers["count"] = count
        if not state.copies:
            state.copies.append({name: value.clone() for name, value in weights.items()})
        else:
            lerp_(state.copies[0], weights, 1.0 / count)

    def value(
        self, state: AverageState, weights: Mapping[str, Tensor], progress: Progress
    ) -> Mapping[str, Tensor] | None:
        """Returns the mean; None before the averaged part."""
        return state.copies[0] if state.copies else None

    def check(self, horizon: Horizon | None) -> None:
        """Raises if the part cannot be converted, or is longer than the budget."""
        assert horizon is not None  # needs_horizon
        share = horizon.fraction(self.duration, stop=1.0, name="over")
        if share > 1.0 + _ROUNDING:
            raise ValueError(
                f"over must be at most the whole budget, got {shown(self.over)}; shorten it, or "
                "train longer"
            )

    def count_from(self, state: AverageState, progress: Progress) -> None:
        """Clears the mean: with another budget, another part of the run is averaged."""
        state.copies, state.numbers = [], {}
