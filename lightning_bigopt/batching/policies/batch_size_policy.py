"""The base class of batch-size policies, and the context that a policy may read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_bigopt.arguments import Specification
from lightning_bigopt.batching.batch_plan import BatchPlan, Rounding, plan_update
from lightning_bigopt.batching.step_function import StepFunction
from lightning_bigopt.checks import check_count, check_number
from lightning_bigopt.durations.duration import Unit
from lightning_bigopt.durations.progress import Progress
from lightning_bigopt.removed import RemovedAttribute
from lightning_bigopt.type_checks import check_instance

__all__ = ["BatchContext", "BatchSizePolicy", "Rounding", "check_explicit_sizes", "plan_at"]


_RENAMED = {"staircase": "step_function", "written_sizes": "explicit_sizes"}


@dataclass(frozen=True, kw_only=True)
class BatchContext:
    """Values that a policy may read besides the progress.

    Args:
        samples_per_epoch: Samples in one pass over the data, over all processes; None if unknown.
        global_batch_size: Current global batch in samples; None before the first update.
        noise_scale: Measured gradient noise scale in samples; None if there is no reliable value.

    Example:
        >>> from lightning_bigopt.batching import FullBatch
        >>> FullBatch()(Progress(fraction=0.0), context=BatchContext(samples_per_epoch=1797))
        1797
    """

    samples_per_epoch: int | None = None
    global_batch_size: int | None = None
    noise_scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("samples_per_epoch", "global_batch_size"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), of="samples", hint="None if unknown")
        # A measurement may be NaN, infinite or negative; policies ignore these values.
        scale: Any = self.noise_scale
        if scale is not None and not isinstance(scale, float):
            check_number("noise_scale", scale, hint="None if it is not measured")


class BatchSizePolicy(Specification, ABC):
    """Returns the global batch of the update that starts at a :class:`Progress`.

    A policy is an immutable value, and calling it is a pure function: the same progress and
    context give the same size on every process and after every restart. It returns the ideal size;
    :func:`plan_at` rounds that size to whole micro-batches on every process.

    Attributes:
        adaptive: True if the size depends on measurements, so that the run cannot be simulated in
            advance.
        rounding: ``"exact"`` raises for a size that does not fit, ``"nearest"`` takes the nearest
            size that fits, ``"up"`` takes the next larger one.
        needs_noise_scale: Whether an adaptive policy reads the noise scale, which
            GradientNoiseScale measures.

    Raises:
        ValueError: If a subclass overrides a method by its name of version 0.1.

    Example:
        >>> class Doubling(BatchSizePolicy):
        ...     def __call__(self, progress, *, context=None):
        ...         return 32 if progress.samples < 10_000 else 64
        >>> Doubling()(Progress(fraction=0.5, samples=20_000))
        64
    """

    _used_in = "BatchSizeScheduler({})"

    adaptive: ClassVar[bool] = False
    rounding: ClassVar[Rounding] = "exact"
    needs_noise_scale: ClassVar[bool] = True

    staircase = RemovedAttribute("0.2", "write step_function")
    written_sizes = RemovedAttribute("0.2", "write explicit_sizes")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for old, new in _RENAMED.items():
            if old in vars(cls):
                raise ValueError(
                    f"{cls.__name__} must override {new}, got its old name {old}; rename "
                    f"{old} to {new}"
                )

    @abstractmethod
    def __call__(self, progress: Progress, *, context: BatchContext | None = None) -> int:
        """Returns the global batch of the update that starts at ``progress``.

        Args:
            progress: Progress before the update.
            context: Further values; None for an empty :class:`BatchContext`.

        Returns:
            Samples in the update, over all processes.
        """

    @property
    def explicit_sizes(self) -> dict[str, int]:
        """Sizes that the user wrote, by the name for error messages; each must fit exactly."""
        return {}

    @property
    def units(self) -> frozenset[Unit]:
        """Units of progress that the policy reads."""
        return frozenset()

    def step_function(self, *, context: BatchContext | None = None) -> StepFunction | None:
        """Returns the piecewise-constant form of the policy, or None if it has none.

        A simulation needs one closed-form step per threshold of that form, instead of a call per
        update.
        """
        return None


def plan_at(
    policy: BatchSizePolicy,
    *,
    progress: Progress,
    micro_batch_size: int,
    world_size: int,
    context: BatchContext | None = None,
) -> BatchPlan:
    """Computes the plan of the update that starts at ``progress``, with the policy's rounding.

    Args:
        policy: Policy that sets the global batch.
        progress: Progress before the update.
        micro_batch_size: Samples in a loader batch of one process.
        world_size: Number of processes that see different data.
        context: Further values that the policy may read; None for an empty one.

    Returns:
        The plan.

    Raises:
        ValueError: If the size does not fit.

    Example:
        >>> from lightning_bigopt.batching import BatchSizeRamp
        >>> ramp = BatchSizeRamp(start=32, end=64, over="10%")
        >>> plan_at(ramp, progress=Progress(fraction=0.04), micro_batch_size=8, world_size=1)
        BatchPlan(micro_batch_size=8, accumulate=6, world_size=1)
    """
    check_instance("policy", policy, BatchSizePolicy, hint="write ConstantBatchSize(256)")
    check_instance("progress", progress, Progress, hint="write Progress(fraction=0.0)")
    if context is not None:
        check_instance("context", context, BatchContext, hint="write None")
    return plan_update(
        policy(progress, context=context or BatchContext()),
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        rounding=policy.rounding,
        name=f"the global batch of {type(policy).__name__}",
    )


def check_explicit_sizes(
    policy: BatchSizePolicy, *, micro_batch_size: int, world_size: int
) -> None:
    """Raises if a size that the user wrote does not fit micro-batch and processes.

    Args:
        policy: The policy, whose :attr:`BatchSizePolicy.explicit_sizes` are checked.
        micro_batch_size: Samples in a loader batch of one process.
        world_size: Number of processes that see different data.

    Raises:
        ValueError: For the first size that does not fit.

    Example:
        >>> from lightning_bigopt.batching import BatchSizeSteps
        >>> policy = BatchSizeSteps({"0%": 32, "50%": 60})
        >>> check_explicit_sizes(policy, micro_batch_size=8, world_size=2)
        Traceback (most recent call last):
        ...
        ValueError: sizes['50%'] must be a multiple of micro_batch_size × processes = 8 × 2 = 16, \
got 60; write 48 or 64, or change micro_batch_size
    """
    check_instance("policy", policy, BatchSizePolicy, hint="write ConstantBatchSize(256)")
    check_count("micro_batch_size", micro_batch_size, of="samples")
    check_count("world_size", world_size, of="processes")
    for name, size in policy.explicit_sizes.items():
        plan_update(size, micro_batch_size=micro_batch_size, world_size=world_size, name=name)
