"""The window of micro-batches that make up the update under way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_bigopt.clock import TrainingClock
from lightning_bigopt.durations import Progress

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_bigopt.clock import Counts

__all__ = ["Window"]


class Window:
    """Notes what the update under way started from, and counts each of its batches once.

    Attributes:
        is_open: Whether micro-batches of an update were begun, and others of it are to come.
        batch_is_begun: Whether the batch under way has been counted.
        batch_samples: Samples of this process in the batch under way.
    """

    def __init__(self, clock: TrainingClock) -> None:
        self._clock = clock
        self._opened: Counts = (0, 0, 0, 0)
        self._progress: Progress | None = Progress(fraction=0.0)
        self._samples_before = 0
        self.is_open = self.batch_is_begun = False
        self.batch_samples = 0

    @property
    def progress(self) -> Progress:
        """What the update under way started from."""
        if self._progress is None:
            self._progress = self._clock.progress_at(self._opened)
        return self._progress

    @property
    def fraction(self) -> float:
        """``progress.fraction``, for who needs no more and asks once an update."""
        return self._clock.fraction_at(self._opened)

    @property
    def samples(self) -> int:
        """Samples over all processes in the window, the batch under way included."""
        return self._clock.counts()[2] - self._samples_before

    def start(self) -> None:
        """Training starts: no window is open, and the next update starts from here."""
        self.forget()
        self._note_where_it_stands()

    def forget(self) -> None:
        """No window crosses an epoch, nor does a batch that never ended."""
        self.is_open = self.batch_is_begun = False
        self._clock.forget_batch()

    def begin_batch(self, trainer: Trainer, batch: Any, *, served: tuple[int, int] | None) -> None:
        """Counts a batch; the first one of a window opens it.

        Args:
            trainer: The Trainer.
            batch: What the loader gave.
            served: As in :meth:`TrainingClock.begin_batch`.
        """
        self.batch_is_begun = True
        if not self.is_open:
            self._note_where_it_stands()
            self.is_open = True
            self._samples_before = self._clock.samples
        self.batch_samples = self._clock.begin_batch(trainer, batch, served=served)

    def end_batch(self, *, closes: bool) -> None:
        """The batch has been trained, and perhaps the update with it."""
        self._clock.end_batch()
        self.batch_is_begun, self.is_open = False, not closes
        if closes:
            self._clock.close_window()

    def _note_where_it_stands(self) -> None:
        self._opened, self._progress = self._clock.counts(), None
