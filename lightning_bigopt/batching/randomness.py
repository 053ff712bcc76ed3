"""Random numbers that belong to a sample, not to the process that happens to fetch it."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["SampleStreams", "mixed_seed"]


def mixed_seed(*parts: int) -> int:
    """One seed below 2**63 out of several integers; neighbors give unrelated seeds.

    Example:
        >>> mixed_seed(0, 1) == mixed_seed(0, 1), mixed_seed(0, 1) == mixed_seed(1, 0)
        (True, False)
    """
    text = ",".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


class SampleStreams:
    """A dataset whose samples each draw from generators seeded for them alone.

    Before sample ``i`` is fetched, the generators of torch, ``random`` and NumPy are seeded from
    ``(seed, i)``; after the batch they are as before, so that fetching in the main process does
    not disturb the model's own random numbers.

    Args:
        dataset: A map-style dataset.
        seed: Decides all streams.

    Example:
        >>> class Noise:
        ...     def __getitem__(self, index):
        ...         return index + random.random()
        >>> streams = SampleStreams(Noise(), seed=3)
        >>> streams.__getitems__([1, 2]) == streams.__getitems__([2, 1])[::-1]
        True
    """

    def __init__(self, dataset: Any, *, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The samples of one batch."""
        numpy = sys.modules.get("numpy")  # a dataset that uses NumPy has imported it
        states = (
            torch.get_rng_state(),
            random.getstate(),
            None if numpy is None else numpy.random.get_state(),
        )
        try:
            return [self._fetch(index, numpy) for index in indices]
        finally:
            torch.set_rng_state(states[0])
            random.setstate(states[1])
            if numpy is not None:
                numpy.random.set_state(states[2])

    def _fetch(self, index: int, numpy: Any) -> Any:
        seed = mixed_seed(self.seed, index)
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        if numpy is not None:
            numpy.random.seed(seed & 0xFFFFFFFF)
        return self.dataset[index]
