"""Batch-size policies whose size never changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.batching.policies.batch_size_policy import (
    BatchContext,
    BatchSizePolicy,
    Rounding,
)
from lightning_bigopt.batching.step_function import StepFunction
from lightning_bigopt.checks import check_count
from lightning_bigopt.durations.duration import Duration
from lightning_bigopt.durations.progress import Progress

__all__ = ["ConstantBatchSize", "FullBatch", "SingleSample"]


@explain_arguments
@dataclass(frozen=True)
class ConstantBatchSize(BatchSizePolicy):
    """The same global batch for every update.

    Args:
        size: Samples per update, over all processes.

    Raises:
        ValueError: If ``size`` is not a positive integer.

    Example:
        >>> ConstantBatchSize(256)(Progress(fraction=0.7))
        256
    """

    size: int

    def __post_init__(self) -> None:
        check_count("size", self.size, of="samples", hint="write an int such as 256")

    def __call__(self, progress: Progress, *, context: BatchContext | None = None) -> int:
        """Returns ``size``."""
        return self.size

    @property
    def explicit_sizes(self) -> dict[str, int]:
        """``size``."""
        return {"size": self.size}

    def step_function(self, *, context: BatchContext | None = None) -> StepFunction:
        """Returns a single step."""
        return _constant(self.size)


@explain_arguments
@dataclass(frozen=True)
class FullBatch(BatchSizePolicy):
    """Batch gradient descent: one update per epoch, over the whole data set in micro-batches.

    Example:
        >>> FullBatch()(Progress(fraction=0.0), context=BatchContext(samples_per_epoch=150))
        150
    """

    rounding: ClassVar[Rounding] = "up"

    def __call__(self, progress: Progress, *, context: BatchContext | None = None) -> int:
        """Returns the number of samples in an epoch.

        Raises:
            ValueError: If ``context`` does not hold that number.
        """
        if context is None or context.samples_per_epoch is None:
            raise ValueError(
                "samples_per_epoch must be known for FullBatch, got None (a loader without a "
                "length); give the loader a length, or use ConstantBatchSize"
            )
        return context.samples_per_epoch

    def step_function(self, *, context: BatchContext | None = None) -> StepFunction:
        """Returns a single step."""
        return _constant(self(Progress(fraction=0.0), context=context))


@explain_arguments
@dataclass(frozen=True)
class SingleSample(BatchSizePolicy):
    """Stochastic gradient descent as in the textbook: one sample per update, for teaching.

    Example:
        >>> SingleSample()(Progress(fraction=0.5))
        1
    """

    def __call__(self, progress: Progress, *, context: BatchContext | None = None) -> int:
        """Returns 1."""
        return 1

    @property
    def explicit_sizes(self) -> dict[str, int]:
        """One sample."""
        return {"SingleSample()": 1}

    def step_function(self, *, context: BatchContext | None = None) -> StepFunction:
        """Returns a single step."""
        return _constant(1)


def _constant(size: int) -> StepFunction:
    return StepFunction([(Duration(0, "fraction"), size)])
