"""The position in the current epoch, whose length may differ from that of other epochs."""

from __future__ import annotations

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
        seen: The announced and the actual number of batches of the last epoch that ended earlier
            than announced; None if there was none.
    """

    def __init__(self) -> None:
        self.length: int | None = None
        self.done = 0
        self.in_samples = False
        self.has_begun = False
        self.seen: tuple[int | None, int] | None = None
        self.ended = 0
        self._accumulation: dict[int, int] = {}  # from each epoch on; empty after a warning

    def start_fit(self, trainer: Trainer) -> None:
        """Reads the planned accumulation, and the length of the first epoch or of its rest."""
        self._accumulation = callbacks.accumulation_schedule(trainer)
        self.begin(trainer)
        self.has_begun = False
        self.ended = loop.epochs_before_fit(trainer)
        if trainer.ckpt_path is not None and not self.in_samples:
            # Not after an interrupted fit: Lightning begins the epoch again, but has the counts.
            self.done = loop.resumed_batches(trainer)

    def begin(self, trainer: Trainer) -> None:
        """Reads the length of an epoch that begins, because every epoch may have a new loader."""
        self.has_begun = True
        self.read_exact_loader(trainer)
        if self.in_samples:
            return
        announced = loop.epoch_batches(trainer)
        self.length, self.done = announced, 0
        if self.seen is not None and self.seen[0] == announced:
            self.length = self.seen[1]

    def read_exact_loader(self, trainer: Trainer) -> None:
        """Reads length and position of a GlobalBatchLoader, which continues within its epoch."""
        exact = loaders.exact_loader(trainer)
        self.in_samples = exact is not None
        if exact is not None:
            self.length, self.done = exact.samples, exact.position

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
        # Not a longer one: Lightning may train one batch too many after a resume.
        is_shorter = not self.in_samples and (announced is None or self.done < announced)
        if self.done and is_shorter and loop.epoch_is_exhausted(trainer, self.done):
            self.seen = announced, self.done
        self.done, self.has_begun = 0, False
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
