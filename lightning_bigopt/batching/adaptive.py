"""A batch-size policy that follows the measured gradient noise scale."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal

from lightning_bigopt.batching.policies import BatchContext, BatchSizePolicy, Rounding, check_size
from lightning_bigopt.durations import Progress

__all__ = ["NoiseScaleBatchSize"]


@dataclass(frozen=True)
class NoiseScaleBatchSize(BatchSizePolicy):
    """Keeps the global batch near a multiple of the gradient noise scale, within bounds.

    The noise scale predicts the critical batch within a factor of 2 to 6 and is itself uncertain:
    this policy moves late (``hysteresis``), by bounded steps (``growth``), and by default only
    upwards. Without a trustworthy measurement the batch stays as it is. It is adaptive: the run is
    not known in advance, so other durations must be in percent or in the budget's own unit.

    Args:
        low: Smallest global batch, and the first.
        high: Largest global batch.
        multiple: Wanted batch over noise scale.
        hysteresis: The wanted batch must differ from the one in force by this factor, above 1.
        growth: Largest factor by which the batch changes at a time, at least ``hysteresis``.
        shrink: ``"never"``, or ``"allow"`` to follow a falling noise scale down.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> policy = NoiseScaleBatchSize(32, high=512)
        >>> now = Progress(fraction=0.2)
        >>> [
        ...     policy(now, context=BatchContext(global_batch_size=64, noise_scale=scale))
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
        check_size("low", self.low)
        check_size("high", self.high)
        if self.high <= self.low:
            raise ValueError(
                f"high must be more than low = {self.low}, got {self.high}; use "
                f"ConstantBatchSize({self.low}) for a batch that stays"
            )
        if not (self.multiple > 0 and math.isfinite(self.multiple)):
            raise ValueError(f"multiple must be positive, got {self.multiple!r}; write 1.0")
        if not (self.hysteresis > 1 and math.isfinite(self.hysteresis)):
            raise ValueError(f"hysteresis must be above 1, got {self.hysteresis!r}; write 1.5")
        if not self.growth >= self.hysteresis:
            raise ValueError(
                f"growth must be at least hysteresis = {self.hysteresis}, got {self.growth!r}"
            )
        if self.shrink not in ("never", "allow"):
            raise ValueError(f"shrink must be 'never' or 'allow', got {self.shrink!r}")

    def __call__(self, progress: Progress, *, context: BatchContext | None = None) -> int:
        """The batch in force, or one step from it towards the wanted batch."""
        context = context or BatchContext()
        current, scale = context.global_batch_size, context.noise_scale
        if current is None:
            return self.low
        if scale is None or not math.isfinite(scale) or scale <= 0:
            return current
        wanted = min(max(self.multiple * scale, self.low), self.high)
        if wanted >= current * self.hysteresis or (wanted == self.high and current < self.high):
            return round(min(wanted, current * self.growth))
        falls = wanted <= current / self.hysteresis or (wanted == self.low and current > self.low)
        if self.shrink == "allow" and falls:
            return round(max(wanted, current / self.growth))
        return current

    @property
    def written_sizes(self) -> dict[str, int]:
        """Both bounds."""
        return {"low": self.low, "high": self.high}
