"""States of the random generators, and mixed seeds."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch

from lightning_bigopt.batching.randomness import (
    mixed_seed,
    preserve_random_state,
    random_state,
    set_random_state,
)

CPU = torch.device("cpu")


def draw():
    return torch.rand(()).item(), random.random(), np.random.random()  # noqa: NPY002


def test_state_saved_to_a_file_repeats_the_numbers_of_all_generators():
    file = io.BytesIO()
    torch.save(random_state(CPU), file)
    first = draw()
    assert draw() != first
    file.seek(0)
    set_random_state(torch.load(file, weights_only=True), CPU)
    assert draw() == first


def test_missing_generators_are_skipped():
    states = {"cpu": random_state(CPU)["cpu"], "cuda": torch.get_rng_state()}
    torch_number = torch.rand(()).item()
    random.seed(3)
    before = random.getstate()
    set_random_state(states, CPU)
    assert torch.rand(()).item() == torch_number
    assert random.getstate() == before


def test_generators_are_restored_after_a_block_and_after_an_error():
    states = random_state(CPU)
    expected = draw()
    set_random_state(states, CPU)
    with preserve_random_state(CPU):
        draw()
    with pytest.raises(ZeroDivisionError), preserve_random_state(CPU):
        draw()[0] / 0
    assert draw() == expected


def test_mixed_seeds_of_neighbors_differ():
    seeds = {mixed_seed(a, b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)
