"""Layouts that cut an epoch into accumulation windows: by loader batches, or by samples."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, TypeAlias

from lightning_bigopt.batching.batch_plan import Rounding, plan_update
from lightning_bigopt.checks import check_choice

__all__ = ["UNBOUNDED", "EpochLayout", "EqualWindows", "ExactSamples", "LoaderBatches", "Tail"]

EpochUnit: TypeAlias = Literal["batches", "samples"]

Tail: TypeAlias = Literal["keep", "merge", "drop"]
"""What happens to the samples at the end of an epoch that are fewer than the update before them."""

UNBOUNDED = 1 << 62
"""Larger than any count; an int instead of ``inf`` keeps the arithmetic in integers."""


class EqualWindows(NamedTuple):
    """Consecutive accumulation windows of the same size.

    Attributes:
        number: Number of windows.
        advance: Width of each window in the unit of the epoch.
        batches: Loader batches of one process in each window.
        samples: Samples over all processes that each window consumes.
        left_out: Those of them that are after the window and are not trained.
    """

    number: int
    advance: int
    batches: int
    samples: int
    left_out: int = 0


class EpochLayout(Protocol):
    """The accumulation windows of an epoch.

    No window crosses the end of an epoch: the last window of an epoch is narrower if the width
    does not divide the length.
    """

    @property
    def unit(self) -> EpochUnit:
        """Unit of ``length``, of widths and of positions."""

    @property
    def length(self) -> int:
        """Length of an epoch; ``UNBOUNDED`` for a stream."""

    def width(self, global_batch_size: int, *, rounding: Rounding, name: str) -> int:
        """Returns the width of a window that holds a global batch in samples.

        Args:
            global_batch_size: Samples over all processes.
            rounding: Treatment of a size that does not fit, as for :func:`plan_update`.
            name: Name of the size in an error message.
        """

    def next_windows(self, width: int, position: int) -> EqualWindows:
        """Returns as many equal windows from ``position`` on as the epoch holds, at least one."""


class LoaderBatches:
    """The epoch of a DataLoader: batches of one size, of which the last may be smaller.

    Args:
        micro_batch_size: Samples in a full batch of one process.
        world_size: Number of processes that see different data.
        batches_per_epoch: Batches of one process in an epoch; None for a stream.
        last_batch_samples: Samples in the last batch of one process; None for a full batch.
    """

    unit: EpochUnit = "batches"

    def __init__(
        self,
        *,
        micro_batch_size: int,
        world_size: int,
        batches_per_epoch: int | None,
        last_batch_samples: int | None,
    ) -> None:
        self._micro_batch_size, self._world_size = micro_batch_size, world_size
        self._batch_samples = micro_batch_size * world_size
        last = micro_batch_size if last_batch_samples is None else last_batch_samples
        self._missing = (micro_batch_size - last) * world_size
        self.length = UNBOUNDED if batches_per_epoch is None else batches_per_epoch

    def width(self, global_batch_size: int, *, rounding: Rounding, name: str) -> int:
        """Returns the number of micro-batches of one process."""
        return plan_update(
            global_batch_size,
            micro_batch_size=self._micro_batch_size,
            world_size=self._world_size,
            rounding=rounding,
            name=name,
        ).accumulate

    def next_windows(self, width: int, position: int) -> EqualWindows:
        """Returns the full windows first, then one with the last batch if it is smaller."""
        left = self.length - position
        # A smaller last batch is not part of the equal windows.
        number = (left - (self._missing > 0)) // width
        if number:
            return EqualWindows(number, width, width, width * self._batch_samples)
        return EqualWindows(1, left, left, left * self._batch_samples - self._missing)


class ExactSamples:
    """The epoch of a GlobalBatchLoader: windows of any size, in as few micro-batches as possible.

    A window that leaves fewer samples of the epoch than it has itself leaves a tail. With
    ``tail="keep"`` the tail is a window of its own, with ``"merge"`` it is part of the window, and
    with ``"drop"`` it is not trained, but consumed: an epoch has the same length with every tail.

    Args:
        micro_batch_size: Largest number of samples in a micro-batch of one process.
        world_size: Number of processes that see different data.
        samples_per_epoch: Samples in one pass over the data.
        tail: ``"keep"``, ``"merge"`` or ``"drop"``.

    Raises:
        ValueError: If ``tail`` is none of these.

    Example:
        >>> layout = ExactSamples(
        ...     micro_batch_size=4, world_size=1, samples_per_epoch=17, tail="merge"
        ... )
        >>> layout.next_windows(8, 0), layout.next_windows(8, 8)
        (EqualWindows(number=1, advance=8, batches=2, samples=8, left_out=0), \
EqualWindows(number=1, advance=9, batches=3, samples=9, left_out=0))
    """

    unit: EpochUnit = "samples"

    def __init__(
        self,
        *,
        micro_batch_size: int,
        world_size: int,
        samples_per_epoch: int,
        tail: Tail = "keep",
    ) -> None:
        check_choice("tail", tail, Tail)
        self._batch_samples = micro_batch_size * world_size
        self.length = samples_per_epoch
        self._tail = tail

    def width(self, global_batch_size: int, *, rounding: Rounding, name: str) -> int:
        """Returns the global batch itself."""
        return global_batch_size

    def next_windows(self, width: int, position: int) -> EqualWindows:
        """Returns the full windows first, then one with the samples that are left."""
        left = self.length - position
        trained = min(width, left)
        number, rest = divmod(left, trained)
        left_out = 0
        if rest and self._tail != "keep":
            # The last full window also consumes the tail: it is not one of the equal windows.
            number -= 1
            if not number:
                number = 1
                trained, left_out = (left, 0) if self._tail == "merge" else (trained, rest)
        samples = trained + left_out
        batches = -(-trained // self._batch_samples)
        return EqualWindows(number, samples, batches, samples, left_out)
