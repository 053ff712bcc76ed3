"""The position in the current epoch, whose length may differ from that of other epochs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_warn

from lightning_bigopt.batching.window_length import WindowLength
from lightning_bigopt.engine.amounts import RunAmounts
from lightning_bigopt.trainer_access import callbacks, loop

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["EpochPosition"]


class EpochPosition:
    """The batches of the current epoch, and its expected length.

    Attributes:
        length: Expected number of batches; None if unknown.
        batches: Batches that have ended.
        seen: The announced and the actual length of the last epoch that ended earlier than
            announced; None if there was none.
    """

    def __init__(self) -> None:
        self.length: int | None = None
        self.batches = 0
        self.has_begun = False  # whether the hook at the start of the epoch was called
        self.seen: tuple[int | None, int] | None = None
        self._accumulation: dict[int, int] = {}  # from each epoch on; empty after a warning

    def start_fit(self, trainer: Trainer) -> None:
        """Reads the planned accumulation, and the length of the first epoch or of its rest."""
        self._accumulation = callbacks.accumulation_schedule(trainer)
        self.begin(trainer)
        self.has_begun = False

    def begin(self, trainer: Trainer) -> None:
        """Reads the length of an epoch that begins, because every epoch may have a new loader."""
        announced = loop.epoch_batches(trainer)
        self.length, self.batches, self.has_begun = announced, 0, True
        if self.seen is not None and self.seen[0] == announced:
            self.length = self.seen[1]

    def differs(self, planned: int | None, counts: RunAmounts) -> bool:
        """Returns whether this epoch, or an earlier one, has another length than planned."""
        if planned is None or self.length is None:
            return False
        return self.length != planned or (
            counts.batches != counts.epochs * planned + counts.epoch_batches
        )

    def end(self, trainer: Trainer) -> None:
        """Ends an epoch; the next one of a loader with the same length is expected to be equal."""
        announced = loop.epoch_batches(trainer)
        # Not a longer one: Lightning may train one batch too many after a resume.
        is_shorter = announced is None or self.batches < announced
        if self.batches and is_shorter and loop.epoch_is_exhausted(trainer, self.batches):
            self.seen = announced, self.batches
        self.batches, self.has_begun = 0, False
        self._check_accumulation(trainer)

    def _check_accumulation(self, trainer: Trainer) -> None:
        used, epoch = trainer.accumulate_grad_batches, trainer.current_epoch
        planned = [length for start, length in self._accumulation.items() if start <= epoch]
        if not planned or isinstance(used, WindowLength) or used == planned[-1]:
            return
        self._accumulation = {}
        rank_zero_warn(
            f"accumulate_grad_batches is {used} in epoch {epoch}, but the run was "
            f"planned with {planned[-1]}: other code has changed it. Durations of schedules in "
            "steps, epochs or samples may end earlier or later than they say. Use "
            "GradientAccumulationScheduler or BatchSizeScheduler, or write durations in percent."
        )
