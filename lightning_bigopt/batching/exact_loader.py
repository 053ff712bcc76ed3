"""A loader whose global batches are exact for any number of processes and after a resume."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, Literal, TypeAlias

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.batching.copyable_iterator import CopyableIterator
from lightning_bigopt.batching.epoch_layout import ExactSamples, Tail
from lightning_bigopt.batching.global_window import GlobalWindow, MicroBatch
from lightning_bigopt.batching.loader_checks import check_dataset, check_loader_options
from lightning_bigopt.batching.randomness import SampleStreams, mixed_seed, permutation
from lightning_bigopt.checks import check_between, check_choice, check_count, shown

__all__ = ["GlobalBatchLoader"]

Sizes: TypeAlias = Callable[[], Iterable[int]]
_Yielded: TypeAlias = tuple[GlobalWindow, int, int]
"""Window, index in the window, and samples that count on this process."""
_MAX_YIELDED = 4096  # far more than workers fetch ahead; bounds memory if micro_batch is unused


@explain_arguments
class GlobalBatchLoader:
    """Gives each update its exact global batch, in an order that depends on the seed alone.

    The samples of an epoch are in one order, which depends on ``seed`` and the epoch. An update
    takes the next ``B`` of them. Process ``r`` of ``R`` takes every ``R``-th of these, from the
    ``r``-th on, and splits them as evenly as possible into as few micro-batches as possible. Every
    process yields the same number of micro-batches per update, so that collectives match. No
    micro-batch is empty: if an update has fewer samples than micro-batches, a process repeats one
    sample with weight 0. Updates are the same on any number of processes. By default the last
    update of an epoch takes the samples that are left, so that every sample is trained exactly once
    per epoch; ``tail`` changes this.

    The loader is a plain iterable without a length, so Lightning does not replace it.
    ``BatchSizeScheduler`` sets its state before each ``iter()``:

    - :attr:`epoch`, :attr:`position` (samples of the epoch trained so far) and :attr:`batches` (of
      this process), with :meth:`advance` and :meth:`end_epoch`, or with :meth:`load_state_dict`;
    - ``rank`` and ``world_size``, with :meth:`set_rank`;
    - the global batches of the next updates, with :meth:`set_batch_sizes`.

    Iteration yields the rest of the epoch and does not change this state, because a batch that has
    been yielded is not trained yet. :meth:`micro_batch` describes the i-th batch yielded.

    Args:
        dataset: A map-style dataset.
        micro_batch_size: Largest number of samples in a micro-batch of one process.
        seed: Seed of the order and of random samples.
        shuffle: ``"permute"`` for a new order in each epoch, ``"sequential"`` for the order of the
            dataset.
        randomness: Random generators that random samples use. ``"ambient"``: the global
            generators; in workers they are seeded from (seed, epoch, position, rank, worker).
            ``"sample"``: a stream per sample that depends only on (seed, epoch, index), so that
            augmented samples are also the same for any number of processes and workers and after
            a resume; this costs about 20 µs per sample.
        tail: What happens to the samples left at the end of an epoch if they are fewer than the
            update before them. ``"keep"``: they are a smaller update. ``"merge"``: the update
            before them also takes them, in micro-batches of at most ``micro_batch_size``; it has
            less than twice its planned samples. ``"drop"``: they are not trained, but count as
            consumed. They are the last samples in the order of the epoch: with ``"permute"``
            different ones in each epoch, with ``"sequential"`` the last ones of the dataset. If an
            epoch has fewer samples than its first update, all of them are trained.
        num_workers: Number of worker processes.
        collate_fn: Makes a batch from a list of samples; None for torch's default.
        options: Further arguments of ``DataLoader``, such as ``{"pin_memory": True}``.

    Raises:
        ValueError: If the dataset has no length or no samples, or ``options`` holds an argument
            that the loader sets.

    Example:
        >>> loader = GlobalBatchLoader(range(10), micro_batch_size=2, shuffle="sequential")
        >>> loader.set_batch_sizes(lambda: [4, 3, 5])
        >>> [batch.tolist() for batch in loader]
        [[0, 1], [2, 3], [4, 5], [6], [7, 8], [9]]
        >>> loader.micro_batch(2).window
        GlobalWindow(position=4, samples=3, accumulate=2, left_out=0)
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
        tail: Tail = "keep",
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        check_count("micro_batch_size", micro_batch_size, of="samples")
        check_dataset(dataset)
        self.samples = len(dataset)  # type: ignore[arg-type]
        check_choice("shuffle", shuffle, ("permute", "sequential"))
        check_choice("randomness", randomness, ("ambient", "sample"))
        check_choice("tail", tail, Tail)
        check_count("num_workers", num_workers, minimum=0, of="processes")
        check_loader_options(seed=seed, collate_fn=collate_fn, options=options)
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.randomness = randomness
        self.tail = tail
        self.num_workers = num_workers
        self.collate_fn = collate_fn
        self.options = dict(options or {})
        self.epoch = self.position = self.batches = 0
        self.rank, self.world_size = 0, 1
        self._sizes: Sizes | None = None
        self._yielded: dict[int, _Yielded] = {}
        self._first = 0  # batches of the epoch before those yielded

    # --------------------------------------------------------------------------------- state

    def set_rank(self, *, rank: int, world_size: int) -> None:
        """Sets the process that the loader yields batches for.

        Args:
            rank: Index of the process, from 0.
            world_size: Number of processes that see different data.

        Raises:
            ValueError: If ``rank`` is not in [0, ``world_size``).
        """
        check_count("world_size", world_size, of="processes")
        check_between("rank", rank, 0, world_size, ends="[)")
        self.rank, self.world_size = rank, world_size

    def set_batch_sizes(self, sizes: Sizes | None) -> None:
        """Sets the global batches of the next updates.

        Workers fetch ahead, so the sizes must not depend on the results of updates. They are a
        function of the samples consumed (see :func:`planned_sizes`), the same on every process.

        Args:
            sizes: Function called at each ``iter()``; returns the sizes in samples from
                :attr:`position` to the end of the epoch or beyond. None for
                ``micro_batch_size × world_size`` throughout.
        """
        self._sizes = sizes

    # Names of version 0.1.
    place = set_rank
    plan = set_batch_sizes

    def advance(self, samples: int) -> None:
        """Moves :attr:`position` past an update that has been trained.

        Args:
            samples: Samples that the update consumes, over all processes: the ``samples`` and
                ``left_out`` of its window.

        Raises:
            ValueError: If the epoch holds fewer samples.
        """
        if not 0 <= samples <= self.samples - self.position:
            raise ValueError(
                f"samples must be from 0 to the {self.samples - self.position} left in the epoch, "
                f"got {shown(samples)}; call end_epoch first"
            )
        self.position += samples

    def end_epoch(self) -> None:
        """Moves to the start of the next epoch; does nothing at the start of an epoch.

        Lightning ends an epoch twice if it resumes from a checkpoint saved at the end of an epoch.
        """
        if self.position:
            self.epoch, self.position, self.batches = self.epoch + 1, 0, 0

    def state_dict(self) -> dict[str, int]:
        """Returns epoch and position as plain numbers, the same on every process."""
        return {
            "version": self.version,
            "epoch": self.epoch,
            "position": self.position,
            "batches": self.batches,
            "seed": self.seed,
            "samples": self.samples,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restores the state that :meth:`state_dict` returned, on any number of processes.

        Raises:
            ValueError: If the state is inside an epoch and the number of samples or the seed
                differs, because the rest of the epoch would hold other samples.
        """
        is_inside = 0 < state["position"] < state["samples"]
        for name in ("samples", "seed"):
            mine = getattr(self, name)
            if state[name] != mine and is_inside:
                raise ValueError(
                    f"{name} must be the checkpoint's {state[name]} to resume inside an epoch, got "
                    f"{mine}; resume from the end of an epoch, or restore {name}"
                )
        self.epoch, self.position = state["epoch"], state["position"]
        self.batches = state.get("batches", 0)  # version 0.1 has not saved it
        if not is_inside:
            self.end_epoch()

    # ------------------------------------------------------------------------------ batches

    def micro_batch(self, index: int) -> MicroBatch:
        """Returns the micro-batch that was yielded as the ``index``-th since ``iter()``.

        Micro-batches with a lower index are discarded.

        Args:
            index: Index of the batch, from 0.

        Raises:
            ValueError: If that batch has not been yielded, or has been discarded.
        """
        if index not in self._yielded:
            raise ValueError(
                "index must be that of a batch yielded since iter() and not discarded, got "
                f"{index!r}; request batches in ascending order"
            )
        for lower in [key for key in self._yielded if key < index]:
            del self._yielded[lower]
        window, index_in_window, mine = self._yielded[index]
        return MicroBatch(
            window=window,
            index=index_in_window,
            epoch_index=self._first + index,
            samples=mine,
            world_size=self.world_size,
        )

    def windows(self) -> Iterator[GlobalWindow]:
        """Yields the accumulation windows of the rest of the epoch.

        Example:
            >>> loader = GlobalBatchLoader(range(10), micro_batch_size=2)
            >>> loader.set_batch_sizes(lambda: [4, 8])
            >>> [(window.samples, window.accumulate) for window in loader.windows()]
            [(4, 2), (6, 3)]
        """
        position = self.position
        share = self.micro_batch_size * self.world_size
        layout = ExactSamples(
            micro_batch_size=self.micro_batch_size,
            world_size=self.world_size,
            samples_per_epoch=self.samples,
            tail=self.tail,
        )
        sizes = iter(repeat(share) if self._sizes is None else self._sizes())
        while position < self.samples:
            size = next(sizes, None)
            if size is None:
                raise ValueError(
                    f"sizes must reach the end of the epoch, got an end at sample {position} of "
                    f"{self.samples}; use planned_sizes"
                )
            check_count("sizes", size, of="samples")
            _, consumed, accumulate, _, left_out = layout.next_windows(size, position)
            yield GlobalWindow(
                position=position,
                samples=consumed - left_out,
                accumulate=accumulate,
                left_out=left_out,
            )
            position += consumed

    def __iter__(self) -> Iterator[Any]:
        """Returns an iterator over the micro-batches of this process in the rest of the epoch."""
        # Lightning calls iter() once before the sizes are known, to test that the loader is
        # iterable. In a generator, nothing runs before the first batch is requested.
        return CopyableIterator(self._micro_batches())

    def _micro_batches(self) -> Iterator[Any]:
        if self.position >= self.samples:
            self.end_epoch()
        # A new dict, because the generator of an earlier iter() may still write to the old one.
        self._yielded, self._first = {}, self.batches
        dataset: Any = self.dataset
        if self.randomness == "sample":
            dataset = SampleStreams(dataset, seed=mixed_seed(self.seed, self.epoch))
        workers = torch.Generator()
        workers.manual_seed(mixed_seed(self.seed, self.epoch, self.position, self.rank))
        yield from DataLoader(
            dataset,
            batch_sampler=self._index_batches(self._yielded),
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            generator=workers,
            **self.options,
        )

    def _index_batches(self, yielded: dict[int, _Yielded]) -> Iterator[list[int]]:
        """Yields the dataset indices of each micro-batch, and records them in ``yielded``."""
        seed, number = mixed_seed(self.seed, self.epoch), 0
        order: Sequence[int] = range(self.samples)
        if self.shuffle == "permute":
            order = permutation(self.samples, seed=seed)
        for window in self.windows():
            first, end = window.position, window.position + window.samples
            # Every R-th sample, so that the shares of the processes differ by one sample at most.
            mine = list(order[first + self.rank : end : self.world_size])
            share, longer = divmod(len(mine), window.accumulate)
            start = 0
            for index in range(window.accumulate):
                stop = start + share + (index < longer)
                yielded[number] = (window, index, stop - start)
                yielded.pop(number - _MAX_YIELDED, None)
                yield mine[start:stop] or [order[first]]
                start, number = stop, number + 1
