"""Batch-size policies that follow a schedule."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Protocol, runtime_checkable

from lightning_bigopt.batching.policies import BatchContext, BatchSizePolicy, Rounding, check_size
from lightning_bigopt.durations import Progress
from lightning_bigopt.schedules import Constant, Schedule

__all__ = ["SchedulePolicy", "SeesawBatchSize"]


@runtime_checkable
class _TradesForBatch(Protocol):
    def batch_factor(self, fraction: float) -> float:
        """What the batch is multiplied by."""


@dataclass(frozen=True)
class SchedulePolicy(BatchSizePolicy):
    """``base`` times the factor of any schedule, to the nearest batch that fits.

    Args:
        schedule: The factor over the share of the budget spent. Its durations must be in percent:
            how long a step or an epoch's update is, is what this policy decides.
        base: Global batch at factor 1.

    Raises:
        ValueError: If ``base`` is not a positive integer, or ``schedule`` never changes or holds a
            duration that is not in percent.

    Example:
        >>> from lightning_bigopt.schedules import Linear
        >>> policy = SchedulePolicy(Linear(start=0.5, end=1.0), base=256)
        >>> [policy(Progress(fraction=f)) for f in (0.0, 0.5, 1.0)]
        [128, 192, 256]
    """

    rounding: ClassVar[Rounding] = "nearest"

    schedule: Schedule
    _: KW_ONLY
    base: int

    def __post_init__(self) -> None:
        check_size("base", self.base)
        _check_schedule(self.schedule)
        if isinstance(self.schedule, Constant):
            size = max(1, round(self.base * self.schedule.level))
            raise ValueError(
                f"schedule must change, got {self.schedule!r}; use ConstantBatchSize({size})"
            )

    def __call__(self, progress: Progress, *, context: BatchContext | None = None) -> int:
        """``base`` times the factor, at least 1."""
        return max(1, round(self.base * self.schedule(progress.fraction)))

    @property
    def written_sizes(self) -> dict[str, int]:
        """``base``."""
        return {"base": self.base}


@dataclass(frozen=True)
class SeesawBatchSize(BatchSizePolicy):
    r"""The batch half of Seesaw: where the learning rate would fall by α, the batch grows by 1/α.

    Args:
        schedule: A ``Seesaw`` schedule, the same that drives the learning rate (there it gives
            :math:`\sqrt\alpha`). Its durations must be in percent.
        base: Global batch at the beginning.
            It also says how far the batch may grow.

    Raises:
        ValueError: If ``base`` is not a positive integer, or ``schedule`` has no ``batch_factor``.

    Example:
        >>> from lightning_bigopt.schedules import Linear, Seesaw
        >>> policy = SeesawBatchSize(Seesaw(Linear()), base=64)
        >>> [policy(Progress(fraction=f)) for f in (0.0, 0.5, 0.75, 1.0)]
        [64, 128, 256, 512]

    References:
        Meterez et al., "Seesaw: Accelerating Training by Balancing Learning Rate and Batch Size
        Scheduling", 2025.
    """

    rounding: ClassVar[Rounding] = "nearest"

    schedule: Schedule
    _: KW_ONLY
    base: int

    def __post_init__(self) -> None:
        check_size("base", self.base)
        _check_schedule(self.schedule)
        if not isinstance(self.schedule, _TradesForBatch):
            raise ValueError(
                f"schedule must be a Seesaw, which trades learning rate for batch, got "
                f"{type(self.schedule).__name__}; use SchedulePolicy for any other schedule"
            )

    def __call__(self, progress: Progress, *, context: BatchContext | None = None) -> int:
        """``base`` times the schedule's batch factor."""
        assert isinstance(self.schedule, _TradesForBatch)  # checked in __post_init__
        return max(1, round(self.base * self.schedule.batch_factor(progress.fraction)))

    @property
    def written_sizes(self) -> dict[str, int]:
        """``base``."""
        return {"base": self.base}


def _check_schedule(schedule: Schedule) -> None:
    if not isinstance(schedule, Schedule):
        raise ValueError(f"schedule must be a Schedule, got {schedule!r}; for instance Linear()")
    try:
        schedule(0.0)
    except ValueError as error:
        raise ValueError(
            f"schedule must have its durations in percent in a batch-size policy, got {schedule!r} "
            f"({error})"
        ) from error
