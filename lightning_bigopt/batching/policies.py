"""What a batch-size policy is, and the policies whose size never changes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from lightning_bigopt.batching.staircase import Staircase
from lightning_bigopt.durations import Duration, Progress, Unit

__all__ = [
    "BatchContext",
    "BatchSizePolicy",
    "ConstantBatchSize",
    "FullBatch",
    "Rounding",
    "SingleSample",
]

Rounding: TypeAlias = Literal["exact", "nearest", "up"]


@dataclass(frozen=True, kw_only=True)
class BatchContext:
    """What a policy may know besides the progress.

    Args:
        samples_per_epoch: Samples in one pass over the data, all processes together; None where
            unknown.
        global_batch_size: The global batch in force; None before the first update.
        noise_scale: The measured gradient noise scale in samples; None where it is not known.

    Example:
        >>> FullBatch()(Progress(fraction=0.0), context=BatchContext(samples_per_epoch=1797))
        1797
    """

    samples_per_epoch: int | None = None
    global_batch_size: int | None = None
    noise_scale: float | None = None


class BatchSizePolicy(ABC):
    """Names the global batch of the update that starts at a :class:`Progress`.

    A policy is an immutable value and its call a pure function: the same progress and context give
    the same size on every process and after every restart. It returns the ideal size; fitting it
    to micro-batches and processes is :func:`plan_at`'s work.

    Attributes:
        adaptive: Whether the size depends on measurements, so that the run is not known in advance.
        rounding: ``"exact"`` where a size that does not fit is an error, ``"nearest"`` where the
            nearest size that fits will do, ``"up"`` where a larger one will.

    Example:
        >>> class Doubling(BatchSizePolicy):
        ...     def __call__(self, progress, *, context=None):
        ...         return 32 if progress.samples < 10_000 else 64
        >>> Doubling()(Progress(fraction=0.5, samples=20_000))
        64
    """

    adaptive: ClassVar[bool] = False
    rounding: ClassVar[Rounding] = "exact"

    @abstractmethod
    def __call__(self, progress: Progress, *, context: BatchContext | None = None) -> int:
        """The global batch, in samples over all processes, of the update at ``progress``."""

    @property
    def written_sizes(self) -> dict[str, int]:
        """The sizes that the user wrote, by the name to blame; each must fit the plan exactly."""
        return {}

    @property
    def units(self) -> frozenset[Unit]:
        """The units of progress that it reads, so that nobody waits for an amount not counted."""
        return frozenset()

    def staircase(self, *, context: BatchContext | None = None) -> Staircase | None:
        """The policy as stairs, which a simulation climbs in closed form; None for no such form."""
        return None


@dataclass(frozen=True)
class ConstantBatchSize(BatchSizePolicy):
    """The same global batch for every update.

    Args:
        size: Samples an update, over all processes.

    Raises:
        ValueError: If ``size`` is not a positive integer.

    Example:
        >>> ConstantBatchSize(256)(Progress(fraction=0.7))
        256
    """

    size: int

    def __post_init__(self) -> None:
        check_size("size", self.size)

    def __call__(self, progress: Progress, *, context: BatchContext | None = None) -> int:
        """Always ``size``."""
        return self.size

    @property
    def written_sizes(self) -> dict[str, int]:
        """``size``."""
        return {"size": self.size}

    def staircase(self, *, context: BatchContext | None = None) -> Staircase:
        """One stair."""
        return Staircase([(Duration(0, "fraction"), self.size)])


@dataclass(frozen=True)
class FullBatch(BatchSizePolicy):
    """Batch gradient descent: one update an epoch, over the whole data in micro-batches.

    Example:
        >>> FullBatch()(Progress(fraction=0.0), context=BatchContext(samples_per_epoch=150))
        150
    """

    rounding: ClassVar[Rounding] = "up"

    def __call__(self, progress: Progress, *, context: BatchContext | None = None) -> int:
        """The samples of an epoch.

        Raises:
            ValueError: If ``context`` does not know them.
        """
        if context is None or context.samples_per_epoch is None:
            raise ValueError(
                "samples_per_epoch must be known for FullBatch, got None (a loader without "
                "length); give the loader a length, or use ConstantBatchSize"
            )
        return context.samples_per_epoch

    def staircase(self, *, context: BatchContext | None = None) -> Staircase:
        """One stair."""
        return Staircase([(Duration(0, "fraction"), self(Progress(fraction=0), context=context))])


@dataclass(frozen=True)
class SingleSample(BatchSizePolicy):
    """Stochastic gradient descent in its textbook sense: one sample an update, for teaching.

    Example:
        >>> SingleSample()(Progress(fraction=0.5))
        1
    """

    def __call__(self, progress: Progress, *, context: BatchContext | None = None) -> int:
        """Always 1."""
        return 1

    @property
    def written_sizes(self) -> dict[str, int]:
        """One."""
        return {"SingleSample()": 1}

    def staircase(self, *, context: BatchContext | None = None) -> Staircase:
        """One stair."""
        return Staircase([(Duration(0, "fraction"), 1)])


def check_size(name: str, size: object) -> None:
    """Refuses what is not a positive integer.

    Raises:
        ValueError: If ``size`` is not; the message names ``name``.

    Example:
        >>> check_size("size", 32)
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(
            f"{name} must be a positive number of samples, got {size!r}; write an int such as 256"
        )
