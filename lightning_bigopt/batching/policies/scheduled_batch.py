"""Batch-size policies that follow a schedule."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Protocol, runtime_checkable

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.batching.policies.batch_size_policy import (
    BatchContext,
    BatchSizePolicy,
    Rounding,
)
from lightning_bigopt.checks import check_count, shown
from lightning_bigopt.durations.progress import Progress
from lightning_bigopt.schedules.base import Schedule
from lightning_bigopt.schedules.decays import Constant
from lightning_bigopt.type_checks import check_instance

__all__ = ["SchedulePolicy", "SeesawBatchSize"]


@runtime_checkable
class _HasBatchFactor(Protocol):
    def batch_factor(self, fraction: float) -> float:
        """Returns the factor on the batch at a fraction of the budget."""


@explain_arguments
@dataclass(frozen=True)
class SchedulePolicy(BatchSizePolicy):
    """``base`` times the factor of any schedule, rounded to the nearest batch that fits.

    Args:
        schedule: Maps the fraction of the budget spent to the factor. Its durations must be in
            percent, because the length of an update in samples depends on this policy.
        base: Global batch in samples at factor 1.

    Raises:
        ValueError: If ``base`` is not a positive integer, or if ``schedule`` is constant or holds
            a duration that is not in percent.

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
        _check_arguments(self.schedule, self.base)
        if isinstance(self.schedule, Constant):
            size = max(1, round(self.base * self.schedule.level))
            raise ValueError(
                f"schedule must change, got {shown(self.schedule)}; use ConstantBatchSize({size})"
            )

    def __call__(self, progress: Progress, *, context: BatchContext | None = None) -> int:
        """Returns ``base`` times the factor, at least 1."""
        return max(1, round(self.base * self.schedule(progress.fraction)))

    @property
    def explicit_sizes(self) -> dict[str, int]:
        """``base``."""
        return {"base": self.base}


@explain_arguments
@dataclass(frozen=True)
class SeesawBatchSize(BatchSizePolicy):
    r"""The batch half of Seesaw: the batch grows while the learning rate decays.

    When the inner schedule multiplies the learning rate by :math:`\alpha`, ``Seesaw`` multiplies it
    by :math:`\sqrt\alpha` and this policy multiplies the batch by :math:`1 / \alpha`.

    Args:
        schedule: The ``Seesaw`` schedule that also drives the learning rate. It limits how far the
            batch grows. Its durations must be in percent.
        base: Global batch in samples of the first update.

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
        _check_arguments(self.schedule, self.base)
        if not isinstance(self.schedule, _HasBatchFactor):
            raise ValueError(
                "schedule must be a Seesaw, which has a batch_factor, got "
                f"{type(self.schedule).__name__}; use SchedulePolicy for any other schedule"
            )

    def __call__(self, progress: Progress, *, context: BatchContext | None = None) -> int:
        """Returns ``base`` times the schedule's batch factor, at least 1."""
        assert isinstance(self.schedule, _HasBatchFactor)  # checked in __post_init__
        return max(1, round(self.base * self.schedule.batch_factor(progress.fraction)))

    @property
    def explicit_sizes(self) -> dict[str, int]:
        """``base``."""
        return {"base": self.base}


def _check_arguments(schedule: Schedule, base: int) -> None:
    check_count("base", base, of="samples", hint="write an int such as 256")
    check_instance("schedule", schedule, Schedule, hint="for instance Linear()")
    try:
        schedule(0.0)
    except ValueError as error:
        raise ValueError(
            f"schedule must have its durations in percent in a batch-size policy, got "
            f"{shown(schedule)} ({error}); write '10%' instead of steps, samples or epochs"
        ) from error
