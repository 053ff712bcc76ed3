"""How windows are cut from an epoch: from a DataLoader's batches, or from samples exactly."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from lightning_bigopt.batching.plan import plan_update
from lightning_bigopt.batching.policies import BatchSizePolicy

__all__ = ["ENDLESS", "ExactSamples", "Geometry", "LoaderBatches", "Windows"]

ENDLESS = 1 << 62
"""More than any count: an int, so that integer arithmetic stays integer."""


class Windows(NamedTuple):
    """Equal windows in a row.

    Attributes:
        number: How many.
        advance: How far each moves on in the epoch.
        batches: Loader batches of one process in each.
        samples: Samples over all processes in each.
    """

    number: int
    advance: int
    batches: int
    samples: int


class Geometry(Protocol):
    """An epoch and its windows, whose width is counted in the epoch's own unit.

    No window crosses the end of an epoch: the last one is narrower where the width does not divide
    the epoch.
    """

    @property
    def length(self) -> int:
        """Of an epoch; ``ENDLESS`` for a stream."""

    @property
    def counter(self) -> int:
        """Which of (updates, batches, samples) counts epochs."""

    def width(self, global_batch_size: int, policy: BatchSizePolicy) -> int:
        """The width of a window that holds a global batch."""

    def ahead(self, width: int, position: int) -> Windows:
        """The longest row of equal windows from ``position``, within the epoch."""


class LoaderBatches:
    """A DataLoader's epoch: batches of one size, of which the last may be short."""

    counter = 1

    def __init__(
        self,
        *,
        micro_batch_size: int,
        world_size: int,
        batches_per_epoch: int | None,
        last_batch_samples: int | None,
    ) -> None:
        self._micro, self._world = micro_batch_size, world_size
        self._batch = micro_batch_size * world_size
        self._missing = (micro_batch_size - (last_batch_samples or micro_batch_size)) * world_size
        self.length = ENDLESS if batches_per_epoch is None else batches_per_epoch

    def width(self, global_batch_size: int, policy: BatchSizePolicy) -> int:
        """Micro-batches of one process."""
        return plan_update(
            global_batch_size,
            micro_batch_size=self._micro,
            world_size=self._world,
            rounding=policy.rounding,
            name=f"the global batch of {type(policy).__name__}",
        ).accumulate

    def ahead(self, width: int, position: int) -> Windows:
        """Full windows, then the one that holds the epoch's last batch where it is another."""
        left = self.length - position
        count = (left - (self._missing > 0)) // width
        if count:
            return Windows(count, width, width, width * self._batch)
        return Windows(1, left, left, left * self._batch - self._missing)


class ExactSamples:
    """A GlobalBatchLoader's epoch: samples, each window in as few micro-batches as hold it."""

    counter = 2

    def __init__(self, *, micro_batch_size: int, world_size: int, samples_per_epoch: int) -> None:
        self._grain = micro_batch_size * world_size
        self.length = samples_per_epoch

    def width(self, global_batch_size: int, policy: BatchSizePolicy) -> int:
        """The global batch itself."""
        return global_batch_size

    def ahead(self, width: int, position: int) -> Windows:
        """Full windows, then the tail."""
        left = self.length - position
        samples = min(width, left)
        return Windows(left // samples, samples, -(-samples // self._grain), samples)
