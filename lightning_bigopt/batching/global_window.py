"""One update's samples, and what each of its micro-batches is worth."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GlobalWindow", "MicroBatch"]


@dataclass(frozen=True, kw_only=True)
class GlobalWindow:
    """One update's samples.

    Args:
        position: Samples of the epoch before it.
        samples: Its samples over all processes.
        accumulate: Its micro-batches on each process.

    Example:
        >>> GlobalWindow(position=32, samples=16, accumulate=2).end
        48
    """

    position: int
    samples: int
    accumulate: int

    @property
    def end(self) -> int:
        """Samples of the epoch after it."""
        return self.position + self.samples


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one emitted batch is worth.

    Args:
        window: The update that it belongs to.
        index: Its place in the update, from 0.
        samples: Samples of this process that count; 0 for a repeated sample that fills a place.
        world_size: Processes that share the update.

    Example:
        >>> window = GlobalWindow(position=0, samples=5, accumulate=1)
        >>> MicroBatch(window=window, index=0, samples=3, world_size=2).weight
        1.2
    """

    window: GlobalWindow
    index: int
    samples: int
    world_size: int

    @property
    def weight(self) -> float:
        """The factor on its mean loss that makes a mean of means exact; 1.0 where all are equal.

        With it, the mean over the window's micro-batches and over the processes is the mean over
        the window's samples.
        """
        share = self.window.accumulate * self.world_size
        return self.samples * share / self.window.samples

    @property
    def global_samples(self) -> int:
        """Samples that count on all processes together."""
        share, longer = divmod(self.window.samples, self.world_size)
        return longer * self._part(share + 1) + (self.world_size - longer) * self._part(share)

    def _part(self, samples: int) -> int:
        """What a process with that many samples in the update has in this micro-batch."""
        share, longer = divmod(samples, self.window.accumulate)
        return share + (self.index < longer)

    @property
    def closes_window(self) -> bool:
        """Whether it is the last micro-batch of its update."""
        return self.index == self.window.accumulate - 1
