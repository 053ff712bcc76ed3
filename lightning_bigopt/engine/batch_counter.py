"""Counts the samples and tokens of each batch, and advances a GlobalBatchLoader."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info

from lightning_bigopt.batching.exact_loader import GlobalBatchLoader
from lightning_bigopt.batching.global_window import MicroBatch
from lightning_bigopt.engine.amounts import BatchAmounts, NeedsSamples
from lightning_bigopt.engine.batch_contents import count, count_rows, uncountable
from lightning_bigopt.engine.clock import Clock
from lightning_bigopt.trainer_access import loaders, loop, strategies

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["BatchCounter"]


class BatchCounter:
    """Counts one batch at a time, in the cheapest way that is exact.

    The sizes of a :class:`GlobalBatchLoader` are known in advance. A loader with a ``batch_size``
    has full batches except for the last of an epoch. Otherwise each batch is counted and summed
    over the processes, if a capability or the budget needs it.

    Args:
        trainer: The Trainer, from ``on_train_start`` on.
        clock: The clock with the functions or fields that count samples and tokens.
        needs_samples: Whether samples must be counted, or are counted if possible.

    Attributes:
        micro_batch: The current micro-batch of a GlobalBatchLoader; None for other loaders.
        samples: Samples of this process in the current batch; None if they are not counted.

    Raises:
        ValueError: If samples or tokens must be counted, and ``training_step`` takes
            ``dataloader_iter``.
    """

    def __init__(self, trainer: Trainer, clock: Clock, *, needs_samples: NeedsSamples) -> None:
        self._clock, self._settings, self._needs = clock, clock.settings, needs_samples
        self._sees_batches = not loop.uses_dataloader_iter(trainer)
        self.micro_batch: MicroBatch | None = None
        self.samples: int | None = 0
        self.begin_epoch(trainer)
        if not self._sees_batches:
            self._check_dataloader_iter()

    def _check_dataloader_iter(self) -> None:
        """Raises if anything needs the batches that ``training_step`` fetches itself."""
        if self._settings.tokens is not None or self._needs == "required":
            unit = "samples" if self._needs == "required" else "tokens"
            raise ValueError(
                f"training_step must take a batch for {unit} to be counted, got one that takes "
                "dataloader_iter; write training_step(self, batch, batch_idx)"
            )

    def begin_epoch(self, trainer: Trainer) -> None:
        """Reads the sizes of the loaders, because every epoch may have new loaders."""
        self._world = strategies.data_parallel_size(trainer)
        self._exact: GlobalBatchLoader | None = loaders.exact_loader(trainer)
        self._first_index: int | None = None
        self.micro_batch = None
        full, last = loaders.micro_batch_size(trainer), None
        if self._settings.samples is None and full is not None and self._sees_batches:
            last = loaders.last_batch_samples(trainer)
        self._sizes = None if full is None or last is None else (full, last)

    def count(self, trainer: Trainer, batch: Any, index: int) -> BatchAmounts:
        """Counts the current batch; a collective if its size is not known in advance.

        Args:
            trainer: The Trainer.
            batch: The batch; None if the loader yielded None.
            index: Index of the batch in the epoch.

        Returns:
            The samples and tokens over all processes.

        Raises:
            ValueError: If the samples must be counted, and cannot be on one of the processes.
        """
        total = self._count_samples(trainer, batch, index)
        tokens = 0
        if self._settings.tokens is not None:
            # A repeated sample of a GlobalBatchLoader, which does not count, has no tokens either.
            local = count(batch, self._settings.tokens, name="tokens") if self.samples != 0 else 0
            tokens = round(strategies.sum_over_data(trainer, local))
        left_out = 0 if self.micro_batch is None else self.micro_batch.left_out
        return BatchAmounts(total + left_out, tokens, left_out=left_out)

    def _count_samples(self, trainer: Trainer, batch: Any, index: int) -> int:
        """Sets :attr:`samples`, and returns the samples over all processes."""
        if self._exact is not None:
            if self._first_index is None:
                # After a resume within an epoch Lightning's index continues, while the loader
                # counts its batches from 0 again.
                self._first_index = index
            self.micro_batch = self._exact.micro_batch(index - self._first_index)
            self.samples = self.micro_batch.samples
            return self.micro_batch.global_samples
        if self._sizes is None:
            return self._count_contents(trainer, batch)
        if batch is None:
            self.samples = 0
            return 0
        full, last = self._sizes
        differs = last != full or self._world > 1
        if differs and loop.is_last_batch(trainer):
            # With a sampler of the user's own the shards of the processes may differ in length.
            self.samples = last
            return round(strategies.sum_over_data(trainer, last))
        self.samples = full
        return full * self._world

    def _count_contents(self, trainer: Trainer, batch: Any) -> int:
        """Counts the rows of the batch, or calls the user's function, where samples are needed."""
        if self._needs is not None:
            self.samples = self._local_samples(batch)
            # Summed, because the clock must be equal on all processes: a policy would otherwise
            # plan windows of different lengths, and the collectives of the processes would not
            # match. A NaN of one process makes the sum NaN, and what follows equal, on all.
            local = math.nan if self.samples is None else float(self.samples)
            total = strategies.sum_over_data(trainer, local)
            if not math.isnan(total):
                return round(total)
            if self._needs == "required":
                raise uncountable(batch)
            rank_zero_info(
                "The samples of the batches cannot be counted, and are left out of the log. Pass "
                "samples=a function of the batch to count them."
            )
            self._needs = None
        self.samples, self._clock.samples_are_known = None, False
        return 0

    def _local_samples(self, batch: Any) -> int | None:
        if not self._sees_batches:
            return None
        if batch is None:
            return 0
        if self._settings.samples is None:
            return count_rows(batch)
        return count(batch, self._settings.samples, name="samples")

    def end_batch(self, *, closes_window: bool) -> None:
        """Advances a GlobalBatchLoader when an update has been trained."""
        # Per update, not per batch: gradients of an open window are not saved, so that a resume
        # must yield the batches of the window again.
        if self._exact is not None and self.micro_batch is not None and closes_window:
            self._exact.advance(self.micro_batch.window.end - self._exact.position)
            self._exact.batches = self.micro_batch.epoch_index + 1

    def loader_state(self) -> dict[str, int] | None:
        """Returns the state of a GlobalBatchLoader; None for other loaders."""
        return None if self._exact is None else self._exact.state_dict()

    def end_epoch(self) -> None:
        """Moves a GlobalBatchLoader to the next epoch, if this one has been trained to its end."""
        exact = self._exact
        if exact is not None and exact.position >= exact.samples:
            exact.end_epoch()
