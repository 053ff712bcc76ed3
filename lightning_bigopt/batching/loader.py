"""A loader that is exact to the sample, on any processes and workers and after any resume."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, Literal, TypeAlias

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_bigopt.batching.global_window import GlobalWindow, MicroBatch
from lightning_bigopt.batching.policies import check_size
from lightning_bigopt.batching.randomness import SampleStreams, mixed_seed

__all__ = ["GlobalBatchLoader"]

Sizes: TypeAlias = Callable[[], Iterable[int]]
_Emitted: TypeAlias = tuple[tuple[int, int, int], int, int]
_OWNED = (
    "batch_sampler",
    "batch_size",
    "collate_fn",
    "dataset",
    "drop_last",
    "generator",
    "num_workers",
    "persistent_workers",
    "sampler",
    "shuffle",
)
_REMEMBERED = 4096  # far more than workers fetch ahead


class GlobalBatchLoader:
    """Serves each update its exact global batch, in an order that nothing but the seed decides.

    The samples of an epoch stand in one order, which depends on ``seed`` and epoch alone. An update
    takes the next ``B`` of them; process ``r`` of ``R`` takes every ``R``-th from the ``r``-th on,
    and cuts them into the fewest micro-batches that hold them, as even as possible. Every process
    emits the same number of micro-batches an update, so collectives match, and none is empty: where
    an update has fewer samples than places, a process repeats one sample with weight 0. The tail of
    an epoch is an update of what is left. So every sample is trained exactly once an epoch, in the
    same updates on any number of processes.

    This is a plain iterable without a length, so Lightning leaves it alone. What it serves is set
    from outside, before each ``iter()``:

    - :attr:`epoch` and :attr:`position` (samples of the epoch trained so far), by :meth:`advance`
      and :meth:`end_epoch` or by :meth:`load_state_dict`;
    - ``rank`` and ``world_size``, by :meth:`place`;
    - the global batches of the updates to come, by :meth:`plan`.

    Iteration emits the rest of the epoch and changes none of these: what was emitted is not yet
    trained. :meth:`micro_batch` tells what the i-th emitted batch is worth.

    Args:
        dataset: A map-style dataset.
        micro_batch_size: The most samples that one process puts through the model at a time.
        seed: Decides order and randomness.
        shuffle: ``"permute"`` for a new order each epoch, ``"sequential"`` for the dataset's own.
        randomness: Where samples that are random draw from. ``"ambient"``: from the global
            generators, which in workers are seeded from (seed, epoch, position, rank, worker).
            ``"sample"``: each from a stream of its own, which depends on (seed, epoch, index)
            alone, so that augmented samples too are the same on any number of processes and
            workers and after a resume; it costs about 20 µs a sample.
        num_workers: Worker processes.
        collate_fn: Makes a batch of a list of samples; None for torch's.
        options: Further arguments of ``DataLoader``, such as ``{"pin_memory": True}``.

    Raises:
        ValueError: If the dataset has no length or no sample, or ``options`` names what the loader
            decides itself.

    Example:
        >>> loader = GlobalBatchLoader(range(10), micro_batch_size=2, shuffle="sequential")
        >>> loader.plan(lambda: [4, 3, 5])
        >>> [batch.tolist() for batch in loader]
        [[0, 1], [2, 3], [4, 5], [6], [7, 8], [9]]
        >>> loader.micro_batch(2).window
        GlobalWindow(position=4, samples=3, accumulate=2)
    """

    version = 1

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        micro_batch_size: int,
        seed: int = 0,
        shuffle: Literal["permute", "sequential"] = "permute",
        randomness: Literal["ambient", "sample"] = "ambient",
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        check_size("micro_batch_size", micro_batch_size)
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ValueError(
                "dataset must have a length and an index with GlobalBatchLoader, got "
                f"{type(dataset).__name__}; use a DataLoader, where BatchSizeScheduler accumulates"
            )
        self.samples = len(dataset)
        if not self.samples:
            raise ValueError("dataset must not be empty, got a length of 0; check its files")
        _one_of("shuffle", shuffle, ("permute", "sequential"))
        _one_of("randomness", randomness, ("ambient", "sample"))
        owned = sorted(set(options or {}).intersection(_OWNED))
        if owned:
            raise ValueError(
                f"options must not hold {', '.join(owned)}, got {dict(options or {})!r}; "
                "GlobalBatchLoader decides them from its own arguments"
            )
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.randomness = randomness
        self.num_workers = num_workers
        self.collate_fn = collate_fn
        self.options = dict(options or {})
        self.epoch = 0
        self.position = 0
        self.rank = 0
        self.world_size = 1
        self._sizes: Sizes | None = None
        self._emitted: dict[int, _Emitted] = {}

    # ------------------------------------------------------------------------ set from outside

    def place(self, *, rank: int, world_size: int) -> None:
        """Tells the loader which process it serves.

        Args:
            rank: This process, from 0.
            world_size: Processes that see different data.

        Raises:
            ValueError: If ``rank`` is not below ``world_size``.
        """
        check_size("world_size", world_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to {world_size - 1}, got {rank!r}")
        self.rank, self.world_size = rank, world_size

    def plan(self, sizes: Sizes | None) -> None:
        """Tells the loader the global batches of the updates to come.

        Workers fetch ahead, so the sizes must not depend on what the updates do: they are a
        function of the samples consumed (see :func:`planned_sizes`), the same on every process.

        Args:
            sizes: Called at each ``iter()``; gives the sizes from :attr:`position` to the end of
                the epoch or beyond. None for ``micro_batch_size × world_size`` throughout.
        """
        self._sizes = sizes

    def advance(self, samples: int) -> None:
        """An update has been trained.

        Args:
            samples: Its samples over all processes.

        Raises:
            ValueError: If that is more than the epoch holds.
        """
        if not 0 <= samples <= self.samples - self.position:
            raise ValueError(
                f"samples must be from 0 to the {self.samples - self.position} left in the epoch, "
                f"got {samples!r}"
            )
        self.position += samples

    def end_epoch(self) -> None:
        """The epoch has been trained; does nothing at the very start of one.

        Lightning ends an epoch twice where it resumes from a checkpoint of an epoch's end.
        """
        if self.position:
            self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Epoch and position, the same on every process."""
        return {
            "version": self.version,
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "samples": self.samples,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on where :meth:`state_dict` was taken, on any number of processes.

        Raises:
            ValueError: If the data or the seed is another, so that the rest of the epoch would not
                be the rest.
        """
        for name in ("samples", "seed"):
            mine = getattr(self, name)
            if state[name] != mine and state["position"]:
                raise ValueError(
                    f"{name} must be the checkpoint's {state[name]} to go on inside an epoch, got "
                    f"{mine}; resume from the end of an epoch, or restore {name}"
                )
        self.epoch, self.position = state["epoch"], state["position"]
        if self.position >= self.samples:
            self.end_epoch()

    # ---------------------------------------------------------------------------------- serving

    def micro_batch(self, index: int) -> MicroBatch:
        """What the ``index``-th batch since ``iter()`` is worth; earlier ones are forgotten.

        Raises:
            ValueError: If that batch has not been emitted, or is forgotten.
        """
        if index not in self._emitted:
            raise ValueError(
                f"index must be that of a batch emitted since iter() and not before one already "
                f"asked for, got {index!r}"
            )
        for old in [key for key in self._emitted if key < index]:
            del self._emitted[old]
        (position, samples, accumulate), place, mine = self._emitted[index]
        return MicroBatch(
            window=GlobalWindow(position=position, samples=samples, accumulate=accumulate),
            index=place,
            samples=mine,
            world_size=self.world_size,
        )

    def windows(self) -> Iterator[GlobalWindow]:
        """The updates of the rest of the epoch.

        Example:
            >>> loader = GlobalBatchLoader(range(10), micro_batch_size=2)
            >>> loader.plan(lambda: [4, 8])
            >>> [(window.samples, window.accumulate) for window in loader.windows()]
            [(4, 2), (6, 3)]
        """
        for position, samples, accumulate in self._cuts():
            yield GlobalWindow(position=position, samples=samples, accumulate=accumulate)

    def _cuts(self) -> Iterator[tuple[int, int, int]]:
        """The same as plain numbers: this runs once an update, ahead of the training."""
        position = self.position
        share = self.micro_batch_size * self.world_size
        sizes = iter(repeat(share) if self._sizes is None else self._sizes())
        while position < self.samples:
            size = next(sizes, None)
            if size is None:
                raise ValueError(
                    f"sizes must reach the end of the epoch, got an end at sample {position} of "
                    f"{self.samples}; use planned_sizes"
                )
            check_size("sizes", size)
            samples = min(size, self.samples - position)
            yield position, samples, -(-samples // share)
            position += samples

    def __iter__(self) -> Iterator[Any]:
        """The micro-batches of this process for the rest of the epoch."""
        if self.position >= self.samples:
            self.end_epoch()
        self._emitted = {}
        dataset: Any = self.dataset
        if self.randomness == "sample":
            dataset = SampleStreams(dataset, seed=mixed_seed(self.seed, self.epoch))
        workers = torch.Generator()
        workers.manual_seed(mixed_seed(self.seed, self.epoch, self.position, self.rank))
        # Nothing begins before the first batch is asked for: Lightning calls iter() to see whether
        # it may, when the plan is not known yet.
        yield from DataLoader(
            dataset,
            batch_sampler=self._batches(self._emitted),
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            generator=workers,
            **self.options,
        )

    def _batches(self, emitted: dict[int, _Emitted]) -> Iterator[list[int]]:
        order, number = self._order(), 0
        for cut in self._cuts():
            position, samples, accumulate = cut
            mine = list(order[position + self.rank : position + samples : self.world_size])
            least, longer = divmod(len(mine), accumulate)
            start = 0
            for place in range(accumulate):
                stop = start + least + (place < longer)
                emitted[number] = (cut, place, stop - start)
                emitted.pop(number - _REMEMBERED, None)
                yield mine[start:stop] or [order[position]]
                start, number = stop, number + 1

    def _order(self) -> Sequence[int]:
        if self.shuffle == "sequential":
            return range(self.samples)
        generator = torch.Generator()
        generator.manual_seed(mixed_seed(self.seed, self.epoch))
        order: list[int] = torch.randperm(self.samples, generator=generator).tolist()
        return order


def _one_of(name: str, value: str, values: tuple[str, ...]) -> None:
    if value not in values:
        raise ValueError(f"{name} must be {' or '.join(map(repr, values))}, got {value!r}")
