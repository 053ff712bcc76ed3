"""The accumulation window of one update over all processes, and its micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GlobalWindow", "MicroBatch"]


@dataclass(frozen=True, kw_only=True)
class GlobalWindow:
    """The accumulation window of one update, over all processes.

    Args:
        position: Samples of the epoch before the window.
        samples: Samples in the window, over all processes.
        accumulate: Micro-batches in the window, on each process.
        left_out: Samples of the epoch after the window that are not trained.

    Example:
        >>> GlobalWindow(position=32, samples=16, accumulate=2).end
        48
    """

    position: int
    samples: int
    accumulate: int
    left_out: int = 0

    @property
    def end(self) -> int:
        """Samples of the epoch before the next window."""
        return self.position + self.samples + self.left_out


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One micro-batch of a window on one process, and the weight of its loss.

    Args:
        window: The window that the micro-batch belongs to.
        index: Index of the micro-batch in the window, from 0.
        epoch_index: Index of the micro-batch in the epoch, from 0, in the run without interruption.
        samples: Samples that count on this process; 0 if the batch only repeats a sample.
        world_size: Number of processes that share the window.

    Example:
        >>> window = GlobalWindow(position=0, samples=5, accumulate=1)
        >>> MicroBatch(window=window, index=0, samples=3, world_size=2).weight
        1.2
    """

    window: GlobalWindow
    index: int
    epoch_index: int = 0
    samples: int
    world_size: int

    @property
    def weight(self) -> float:
        """Factor on the mean loss of the micro-batch; 1.0 if all micro-batches are equal.

        With it, the mean over the micro-batches and processes of a window is the mean over the
        samples of the window.
        """
        # Lightning divides each loss by the accumulation, and DDP averages over the processes:
        # together by the number of parts.
        parts = self.window.accumulate * self.world_size
        return self.samples * parts / self.window.samples

    @property
    def left_out(self) -> int:
        """Samples of the epoch after the micro-batch that are not trained."""
        is_last = self.index + 1 == self.window.accumulate
        return self.window.left_out if is_last else 0

    @property
    def global_samples(self) -> int:
        """Samples that count in the micro-batches with this index, over all processes."""
        # The first ``longer`` processes have one sample more than the others. The loader splits in
        # the same way, so that the sum needs no communication.
        share, longer = divmod(self.window.samples, self.world_size)
        return longer * self._part(share + 1) + (self.world_size - longer) * self._part(share)

    def _part(self, samples: int) -> int:
        """Returns the samples in this micro-batch of a process with ``samples`` in the window."""
        share, longer = divmod(samples, self.window.accumulate)
        return share + (self.index < longer)
