"""Keeps the random states of the process while trainings set seeds of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightning_bigopt.batching.randomness import preserve_random_state

__all__ = ["random_states_kept"]

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
