"""The position in the current epoch, whose length may differ from that of other epochs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_warn

from lightning_bigopt.batching.window_length import WindowLength
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.engine.amounts import RunAmounts
from lightning_bigopt.trainer_access import callbacks, loaders, loop

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["EpochPosition"]


class EpochPosition:
    """The amount done of the current epoch, and the expected length of the epoch.

    Both are in batches of one process. With a GlobalBatchLoader, whose batches differ in size, they
    are in samples of all processes.

    Attributes:
        length: Expected length; None if unknown.
        done: Amount that has ended.
        in_samples: Whether both are in samples.
        has_begun: Whether the hook at the start of the epoch was called.
        ended: Epochs that had ended before this fit.
        seen: The announced and the actual number of batches of the last whole epoch, if it ended
            earlier than announced; else None.
        grew: Whether the current batch has shown that the epoch is longer than expected.
        next_check: Index of the batch from which on :meth:`check_length` must be called.
    """

    def __init__(self) -> None:
        self.length: int | None = None
        self.done = 0
        self.in_samples = False
        self.has_begun = False
        self.seen: tuple[int | None, int] | None = None
        self.grew = False
        self.next_check = 0.0
        self.ended = 0
        self._announced: int | None = None
        self._continues_run = False  # whether this is the first epoch after a resume
        self._within = False  # whether the resume continues within it
        self._is_trained = False  # whether the resume continues after its last batch
        self._has_state = False  # whether its loaders continue from a state
        # Whether this epoch can show that it is longer than the last, and its length.
        self._shows_longer = self._shows_length = True
        self._has_batch = False
        self._accumulation: dict[int, int] = {}  # from each epoch on; empty after a warning

    def start_fit(self, trainer: Trainer) -> None:
        """Reads the planned accumulation, and the length of the first epoch or of its rest."""
        self._accumulation = callbacks.accumulation_schedule(trainer)
        self.begin(trainer)
        self.has_begun = False
        self.ended = loop.epochs_before_fit(trainer)
        # Not the path alone: LearningRateFinder sets it too, at update 0.
        self._continues_run = trainer.ckpt_path is not None and loop.has_trained_batches(trainer)
        self._within = loop.restarts_within_epoch(trainer)
        self._has_state = loaders.stateful(trainer)
        if trainer.ckpt_path is None:
            return  # after an interrupted fit Lightning begins the epoch again, but has the counts
        self._is_trained = loop.resumes_at_end_of_epoch(trainer)
        if self._is_trained:
            self.done = self.length or 0
        elif not self.in_samples:
            self.done = loop.resumed_batches(trainer)

    def begin(self, trainer: Trainer) -> None:
        """Reads the length of an epoch that begins, because every epoch may have a new loader."""
        self.has_begun, self._has_batch, self._is_trained = True, False, False
        self.read_exact_loader(trainer)
        if self.in_samples:
            self.next_check = math.inf
            return
        announced = loop.epoch_batches(trainer)
        self.length, self._announced, self.done, self.next_check = announced, announced, 0, 0
        if self.seen is not None and self.seen[0] == announced:
            self.length = self.seen[1]

    def read_exact_loader(self, trainer: Trainer) -> None:
        """Reads length and position of a GlobalBatchLoader, which continues within its epoch."""
        exact = loaders.exact_loader(trainer)
        self.in_samples = exact is not None
        if exact is not None:
            # A loader begins the next epoch before the current one is counted.
            self.length = exact.samples
            self.done = exact.samples if self._is_trained else exact.position

    def check_length(self, index: int) -> None:
        """Corrects the length if the epoch is longer than expected.

        Call it for the first batch of a window only: all its batches have the same progress.

        Args:
            index: Number of batches of this epoch before the current one.
        """
        if not self._has_batch:
            self._read_first_batch(index)
        expected, announced = self.length or 0, self._announced
        is_shorter = announced is not None and expected < announced
        self.grew = is_shorter and expected <= index
        if self.grew:
            self.length = announced
            if self._shows_longer:
                self.seen = None
            self.next_check = index + 1
        else:
            self.next_check = expected if is_shorter else math.inf

    def _read_first_batch(self, index: int) -> None:
        """Decides what the epoch can show, from its first batch in this fit."""
        self._has_batch = True
        if index:
            # A loader without a state has begun again within the epoch. One with a state may have
            # omitted a batch that was fetched and not trained.
            self._shows_longer = self._continues_run and self._within and self._has_state
            self._shows_length = False
        else:
            # After a resume a stateful loader may give the rest of its data as the next epoch.
            self._shows_longer = True
            self._shows_length = not (self._continues_run and self._has_state)

    def differs(self, horizon: Horizon, counts: RunAmounts) -> bool:
        """Returns whether this epoch, or an earlier one, has another length than planned."""
        planned, consumed = horizon.batches_per_epoch, counts.batches
        if self.in_samples:
            planned, consumed = horizon.samples_per_epoch, counts.samples
        if planned is None or self.length is None:
            return False
        return self.length != planned or consumed != counts.epochs * planned + counts.epoch_done

    def end(self, trainer: Trainer) -> None:
        """Ends an epoch; the next one of a loader with the same length is expected to be equal."""
        announced = loop.epoch_batches(trainer)
        is_known = self._shows_length and not self.in_samples
        if self.done and is_known and loop.epoch_is_exhausted(trainer, self.done):
            is_shorter = announced is None or self.done < announced
            self.seen = (announced, self.done) if is_shorter else None
        self.done, self.has_begun, self._is_trained = 0, False, False
        self._continues_run = self.grew = False
        self._check_accumulation(trainer)

    def continue_epoch(self, trainer: Trainer) -> None:
        """Continues an epoch after a resume, for which Lightning omits ``on_train_epoch_start``."""
        self.begin(trainer)
        used, planned = self._accumulations(trainer)
        if used == planned:
            return
        self._accumulation = {}  # warned of once
        rank_zero_warn(
            f"accumulate_grad_batches is {used} in the rest of epoch {trainer.current_epoch}, but "
            f"GradientAccumulationScheduler sets {planned}: Lightning does not call it when a run "
            "resumes within an epoch. Resume from a checkpoint of the end of an epoch, or set "
            f"trainer.accumulate_grad_batches = {planned} in on_train_start of a callback that is "
            "listed behind it."
        )

    def _check_accumulation(self, trainer: Trainer) -> None:
        used, planned = self._accumulations(trainer)
        if used == planned:
            return
        self._accumulation = {}
        rank_zero_warn(
            f"accumulate_grad_batches is {used} in epoch {trainer.current_epoch}, but the run was "
            f"planned with {planned}: other code has changed it. Durations of schedules in "
            "steps, epochs or samples may end earlier or later than they say. Use "
            "GradientAccumulationScheduler or BatchSizeScheduler, or write durations in percent."
        )

    def _accumulations(self, trainer: Trainer) -> tuple[int, int]:
        """Returns the accumulation in this epoch, and the planned one if it is known."""
        used = trainer.accumulate_grad_batches
        if not self._accumulation or isinstance(used, WindowLength):
            return used, used
        epoch = trainer.current_epoch
        return used, [n for start, n in self._accumulation.items() if start <= epoch][-1]
