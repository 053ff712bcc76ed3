"""Plans the global batch and the accumulation window of each update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from lightning_bigopt.batching.batch_plan import BatchPlan
from lightning_bigopt.batching.policies.batch_size_policy import BatchSizePolicy
from lightning_bigopt.batching.window_length import WindowLength
from lightning_bigopt.callbacks.batch_size.batch_norm_check import BatchNormCheck
from lightning_bigopt.durations.progress import Progress
from lightning_bigopt.engine.batch_source import BatchSource
from lightning_bigopt.engine.stage import Batch, Fit
from lightning_bigopt.planning.outline import batch_stages, describe_batches
from lightning_bigopt.trainer_access import loop

__all__ = ["BatchPlanner", "PlannedWindow"]


class PlannedWindow(NamedTuple):
    """The plan of an accumulation window.

    Attributes:
        global_batch_size: Samples of the update over all processes, as the policy returned it.
        length: Number of micro-batches of one process, with the index of the first one.
    """

    global_batch_size: int
    length: WindowLength


class BatchPlanner:
    """Turns the global batch sizes of a policy into accumulation windows on the training loader.

    Args:
        fit: The fit, from ``start`` on.
        policy: The policy.
        micro_batch_size: Samples in a batch of one process, for a loader without ``batch_size``.
        max_micro_batch_size: Largest micro-batch size allowed; None for no limit.
        size: Global batch size of the previous update; None before the first update.
        noise_scale: Returns the current noise scale, for an adaptive policy.

    Attributes:
        source: Batch sizes of the training loader.
        size: Global batch size of the current update.
    """

    def __init__(
        self,
        fit: Fit,
        policy: BatchSizePolicy,
        *,
        micro_batch_size: int | None,
        max_micro_batch_size: int | None,
        size: int | None,
        noise_scale: Callable[[], float | None],
    ) -> None:
        self._fit, self._policy = fit, policy
        self._micro_batch_size = micro_batch_size
        self._max_micro_batch_size = max_micro_batch_size
        self._noise_scale = noise_scale
        self.size = size
        self.source = self._read_source()
        self._beyond_epoch = 0  # the largest batch of the policy that exceeds an epoch
        self._has_warned = False
        self._batch_norm = BatchNormCheck(fit)
        self._decided: tuple[Progress, tuple[int, BatchPlan]] | None = None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copy of the callback leaves the fit out

    def _read_source(self) -> BatchSource:
        return BatchSource.from_trainer(
            self._fit.trainer,
            self._policy,
            micro_batch_size=self._micro_batch_size,
            max_micro_batch_size=self._max_micro_batch_size,
        )

    def begin_epoch(self) -> None:
        """Reads the batch sizes of the loaders again, because an epoch may have new loaders.

        Raises:
            ValueError: If the size of their batches has changed.
        """
        self.source = self.source.check_unchanged(self._read_source())

    def begin_batch(self, batch: Batch) -> None:
        """Watches the first forward pass for layers that a later micro-batch would fail."""
        self._batch_norm.begin_batch(batch)

    def end(self) -> None:
        """Removes hooks on the module."""
        self._batch_norm.end()

    def plan_at(self, progress: Progress) -> tuple[int, BatchPlan]:
        """Returns global batch size and plan of the update that starts at ``progress``."""
        # Decided once per update: it is called for each scaled field, and an adaptive policy must
        # not get another noise scale in a later call.
        if self._decided is None or self._decided[0] != progress:
            self._decided = progress, self._plan(progress)
        return self._decided[1]

    def _plan(self, progress: Progress) -> tuple[int, BatchPlan]:
        scale = None
        if self._policy.adaptive and self._policy.needs_noise_scale:
            scale = self._noise_scale()
        size, plan = self.source.plan(self._policy, progress, current=self.size, noise_scale=scale)
        limit = self.source.largest_batch
        if limit is None or size <= limit:
            return size, plan
        # A window ends with the epoch: this is the batch that is trained, and that scales the
        # learning rate.
        self._beyond_epoch = max(self._beyond_epoch, size)
        per_step = plan.micro_batch_size * plan.world_size
        return limit, replace(plan, accumulate=-(-limit // per_step))

    def change_size(self, size: int) -> None:
        """Sets the current global batch size, which an adaptive policy continues with."""
        self.size, self._decided = size, None

    def open_window(self, batch: Batch, progress: Progress) -> PlannedWindow:
        """Returns the window that starts with a batch; it ends with the epoch at the latest."""
        self.size, plan = self.plan_at(progress)
        if self._policy.adaptive:
            self._warn_beyond_epoch()
        micro = batch.micro_batch
        if micro is not None:
            # GlobalBatchLoader has planned the window. After a resume within a window it yields all
            # micro-batches of the window again, the first of them with index 0.
            length = WindowLength(micro.window.accumulate, batch.index - micro.index)
            return PlannedWindow(self.size, length)
        trainer = self._fit.trainer
        accumulate, batches = plan.accumulate, loop.epoch_batches(trainer)
        if loop.is_last_batch(trainer):  # known without a length of the loader
            accumulate = 1
        elif batches is not None:
            accumulate = min(accumulate, batches - batch.index)
        return PlannedWindow(self.size, WindowLength(accumulate, batch.index))

    def describe_interrupted_window(self, window: tuple[int, int], ready: int) -> str:
        """Describes how a resume continues after a checkpoint within a window.

        Args:
            window: Length of the window and index of its first batch.
            ready: Batches of the epoch that were fetched before the checkpoint.
        """
        length, start = window
        continuation = "a new window starts with the next batch"
        if self.source.is_exact:
            continuation = "the loader repeats the window"
        return (
            f"The checkpoint was written inside a window ({ready - start} of {length} "
            f"micro-batches); their gradients were not saved, and {continuation}."
        )

    def _warn_beyond_epoch(self) -> None:
        """Warns once if a global batch of the policy is larger than the data of an epoch."""
        samples, is_short = self.source.samples_per_epoch, loop.is_fast_dev_run(self._fit.trainer)
        if not self._beyond_epoch or self._has_warned or is_short:
            return
        self._has_warned = True
        rank_zero_warn(
            f"The global batch of {self._beyond_epoch} samples is larger than an epoch of "
            f"{samples} samples. An accumulation window ends with the epoch, so these updates have "
            f"at most {samples} samples; choose a batch of at most {samples}, or train on more "
            "data per epoch."
        )

    def changes(self) -> list[tuple[Progress, int]]:
        """Returns the progress at which the global batch size changes, with the new size.

        The first entry is the start of the run. The list is empty if the sizes are not known in
        advance.
        """
        horizon = self._fit.clock.horizon
        if horizon is None or self._policy.adaptive:
            return []
        return list(batch_stages(horizon, lambda progress: self._plan(progress)[0]))

    def describe(self, changes: list[tuple[Progress, int]]) -> str:
        """Describes the batch sizes of the run in one sentence; warns if one exceeds an epoch."""
        horizon = self._fit.clock.horizon
        first = self.source.describe(*self.plan_at(self._fit.clock.progress()))
        self._warn_beyond_epoch()
        updates = None if horizon is None else horizon.total("steps")
        return describe_batches(first, changes, updates=updates)
