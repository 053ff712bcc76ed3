"""States of the random generators, mixed seeds, and random streams for single samples."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

__all__ = [
    "SampleStreams",
    "mixed_seed",
    "permutation",
    "preserve_random_state",
    "random_state",
    "seed_generators",
    "set_random_state",
]


def random_state(device: torch.device) -> dict[str, Any]:
    """Returns the states of the generators that a training step may use, as plain data.

    The state holds torch's generator on the CPU and on a CUDA device, Python's generator, and
    NumPy's if NumPy has been imported.

    Args:
        device: Device of the training step.

    Returns:
        States for :func:`set_random_state`: tensors and plain data.

    Example:
        >>> sorted(set(random_state(torch.device("cpu"))) - {"numpy"})
        ['cpu', 'python']
    """
    states: dict[str, Any] = {"cpu": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    numpy = sys.modules.get("numpy")  # not imported here: a step that uses NumPy has imported it
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        # As a list, so that a file with the state loads with weights_only=True.
        states["numpy"] = (name, keys.tolist(), *rest)
    return states


def set_random_state(states: Mapping[str, Any], device: torch.device) -> None:
    """Sets the generators to the states of :func:`random_state`, as far as they exist here.

    Args:
        states: States of the generators; missing ones are skipped, except ``"cpu"``.
        device: Device of the training step.

    Example:
        >>> cpu = torch.device("cpu")
        >>> states = random_state(cpu)
        >>> first = random.random()
        >>> set_random_state(states, cpu)
        >>> random.random() == first
        True
    """
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    if "python" in states:
        random.setstate(states["python"])
    numpy = sys.modules.get("numpy")
    if "numpy" in states and numpy is not None:
        numpy.random.set_state(tuple(states["numpy"]))


@contextmanager
def preserve_random_state(device: torch.device) -> Iterator[None]:
    """Restores the states of the generators when the block ends or raises.

    Args:
        device: Device of the training step.

    Example:
        >>> with preserve_random_state(torch.device("cpu")):
        ...     first = random.random()
        >>> random.random() == first
        True
    """
    states = random_state(device)
    try:
        yield
    finally:
        set_random_state(states, device)


def mixed_seed(*parts: int) -> int:
    """Mixes several integers into one seed below 2**63; similar integers give unrelated seeds.

    Example:
        >>> mixed_seed(0, 1) == mixed_seed(0, 1), mixed_seed(0, 1) == mixed_seed(1, 0)
        (True, False)
    """
    # A hash, because sums or products of the parts would give many of them the same seed; shifted
    # to fit into a signed 64-bit integer.
    text = ",".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_generators(seed: int) -> None:
    """Seeds the generators of torch on all devices, ``random`` and NumPy.

    Args:
        seed: The seed, non-negative and below 2**63.
    """
    torch.manual_seed(seed)
    _seed_on_cpu(seed)


def _seed_on_cpu(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")  # code that uses NumPy has imported it
    if numpy is not None:
        numpy.random.seed(seed & 0xFFFFFFFF)  # NumPy accepts 32 bits only


class SampleStreams:
    """Wraps a dataset so that each sample has its own random stream.

    Before sample ``i`` is fetched, the generators of torch, ``random`` and NumPy are seeded from
    ``(seed, i)``. After the batch their states are restored, so that fetching in the main process
    does not change the random numbers of the model.

    Args:
        dataset: A map-style dataset.
        seed: Seed of all streams.

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
        """Returns the samples of one batch."""
        with preserve_random_state(torch.device("cpu")):
            return [self._fetch(index) for index in indices]

    def _fetch(self, index: int) -> Any:
        _seed_on_cpu(mixed_seed(self.seed, index))
        return self.dataset[index]


def permutation(count: int, *, seed: int) -> list[int]:
    """Returns the numbers from 0 to ``count - 1`` in an order that depends on the seed alone.

    Example:
        >>> sorted(permutation(4, seed=1)), permutation(4, seed=1) == permutation(4, seed=1)
        ([0, 1, 2, 3], True)
    """
    generator = torch.Generator()
    generator.manual_seed(seed)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order
