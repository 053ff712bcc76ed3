"""A batch-size policy that follows the measured gradient noise scale."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.batching.policies.batch_size_policy import (
    BatchContext,
    BatchSizePolicy,
    Rounding,
)
from lightning_bigopt.checks import check_between, check_choice, check_count, check_positive
from lightning_bigopt.durations.progress import Progress

__all__ = ["NoiseScaleBatchSize"]


@explain_arguments
@dataclass(frozen=True)
class NoiseScaleBatchSize(BatchSizePolicy):
    """Keeps the global batch near a multiple of the gradient noise scale, within bounds.

    The noise scale predicts the critical batch within a factor of 2 to 6, and its estimate has an
    error. The policy therefore requires a clear difference (``hysteresis``), limits each change
    (``growth``), and by default never reduces the batch. Without a reliable measurement the batch
    does not change. The policy is adaptive: because the run cannot be simulated in advance, other
    durations must be in percent or in the unit of the budget.

    Args:
        low: Smallest global batch in samples, and the first.
        high: Largest global batch in samples, more than ``low``.
        multiple: Target batch divided by the noise scale, dimensionless.
        hysteresis: Factor, above 1, by which the target must differ from the current batch before
            the batch changes.
        growth: Largest factor by which the batch changes at a time; at least ``hysteresis``, and
            ``inf`` for no limit.
        shrink: ``"never"``, or ``"allow"`` to follow a falling noise scale down.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> policy = NoiseScaleBatchSize(32, high=512)
        >>> progress = Progress(fraction=0.2)
        >>> [
        ...     policy(progress, context=BatchContext(global_batch_size=64, noise_scale=scale))
        ...     for scale in (None, 80.0, 100.0, 4000.0, 3.0)
        ... ]
        [64, 64, 100, 128, 64]
    """

    adaptive: ClassVar[bool] = True
    rounding: ClassVar[Rounding] = "nearest"

    low: int
    _: KW_ONLY
    high: int
    multiple: float = 1.0
    hysteresis: float = 1.5
    growth: float = 2.0
    shrink: Literal["never", "allow"] = "never"

    def __post_init__(self) -> None:
        check_count("low", self.low, of="samples", hint="write an int such as 32")
        check_count("high", self.high, of="samples", hint="write an int such as 512")
        if self.high <= self.low:
            raise ValueError(
                f"high must be more than low = {self.low}, got {self.high}; use "
                f"ConstantBatchSize({self.low}) for a batch that stays"
            )
        check_positive("multiple", self.multiple, hint="write 1.0")
        check_between("hysteresis", self.hysteresis, 1, math.inf, hint="write 1.5")
        check_between("growth", self.growth, 1, math.inf, ends="(]", hint="write 2.0")
        if self.growth < self.hysteresis:
            raise ValueError(
                f"growth must be at least hysteresis = {self.hysteresis}, got {self.growth}; "
                "write 2.0"
            )
        check_choice("shrink", self.shrink, ("never", "allow"))

    def __call__(self, progress: Progress, *, context: BatchContext | None = None) -> int:
        """Returns the current batch, or a batch one step nearer to the target."""
        context = context or BatchContext()
        current, scale = context.global_batch_size, context.noise_scale
        if current is None:
            return self.low
        if scale is None or not math.isfinite(scale) or scale <= 0:
            return current
        target = min(max(self.multiple * scale, self.low), self.high)
        # A bound is reached without hysteresis, or a batch just below ``high`` could never get
        # there.
        if target >= current * self.hysteresis or (target == self.high and current < self.high):
            return round(min(target, current * self.growth))
        falls = target <= current / self.hysteresis or (target == self.low and current > self.low)
        if self.shrink == "allow" and falls:
            return round(max(target, current / self.growth))
        return current

    @property
    def explicit_sizes(self) -> dict[str, int]:
        """``low`` and ``high``."""
        return {"low": self.low, "high": self.high}
