"""Keeps the random states of the process while trainings set seeds of their own."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightning_bigopt.batching.randomness import preserve_random_state

__all__ = ["random_states_kept", "seed_apart"]

_SEED_VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Restores the random states and the variables of ``seed_everything`` when the block ends."""
    kept = {name: os.environ.get(name) for name in _SEED_VARIABLES}
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with preserve_random_state(device):
            yield
    finally:
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def seed_apart(seed: int, part: object) -> None:
    """Sets the seeds for one part of a training, apart from those of its other parts.

    Args:
        seed: Seed of the training.
        part: The part, such as ``"data"`` or the number of an epoch.
    """
    from lightning.pytorch import seed_everything

    mixed = random.Random(f"{seed}/{part}").getrandbits(32)  # noqa: S311
    seed_everything(mixed, workers=True, verbose=False)
