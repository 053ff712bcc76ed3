"""The search for the largest micro-batch, with simulated memory."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bigopt.batching import search_micro_batch_size


class SimulatedMemory:
    """Succeeds up to ``limit``, and records every size that is tried."""

    def __init__(self, limit):
        self.limit = limit
        self.asked = []

    def __call__(self, size):
        self.asked.append(size)
        return size <= self.limit


@given(limit=st.integers(1, 3000), maximum=st.integers(1, 2000))
def test_binary_search_finds_the_limit(limit, maximum):
    memory = SimulatedMemory(limit)
    found = search_micro_batch_size(memory, maximum=maximum, headroom=0.0)
    assert found.micro_batch_size == found.largest == min(limit, maximum)
    assert len(memory.asked) == len(set(memory.asked)), "no size is tried twice"
    assert len(memory.asked) <= 2 * maximum.bit_length() + 2
    assert found.trials == tuple((size, size <= limit) for size in memory.asked)


@given(
    limit=st.integers(1, 300),
    share=st.integers(1, 600),
    search=st.sampled_from(["binary", "power"]),
    headroom=st.sampled_from([0.0, 0.1, 0.25, 0.5]),
)
def test_divisors_headroom_and_powers_against_a_scan(limit, share, search, headroom):
    memory = SimulatedMemory(limit)
    found = search_micro_batch_size(
        memory, maximum=share, divides=share, search=search, headroom=headroom
    )
    allowed = [n for n in range(1, share + 1) if share % n == 0]
    if search == "power":
        allowed = [n for n in allowed if n & (n - 1) == 0]
    largest = max(n for n in allowed if n <= limit)
    kept = [n for n in allowed if n <= (1 - headroom) * largest]
    assert found.largest == largest
    assert found.micro_batch_size == (max(kept) if kept else allowed[0])
    assert found.micro_batch_size in memory.asked


@given(seed=st.integers(0, 10**6), maximum=st.integers(1, 200))
def test_returned_size_ran_even_if_memory_is_inconsistent(seed, maximum):
    generator, answers = random.Random(seed), {}

    def try_size(size):
        assert size not in answers
        answers[size] = size == 1 or generator.random() < 0.6
        return answers[size]

    found = search_micro_batch_size(try_size, maximum=maximum)
    assert answers[found.micro_batch_size]
    assert answers[found.largest]
    assert found.micro_batch_size <= found.largest <= maximum


def test_sizes_double_and_then_bisect():
    memory = SimulatedMemory(40)
    search_micro_batch_size(memory, maximum=1000, headroom=0.0)
    assert memory.asked == [1, 2, 4, 8, 16, 32, 64, 48, 40, 44, 42, 41]


def test_smallest_size_that_does_not_fit_raises():
    with pytest.raises(ValueError, match=r"with micro_batch_size=1, got out of memory; shorten"):
        search_micro_batch_size(lambda size: False, maximum=8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"maximum": 0}, r"maximum must be a positive"),
        ({"maximum": 8, "headroom": 1.0}, r"headroom must be in \[0, 1\), got 1.0"),
        ({"maximum": 8, "headroom": -0.1}, r"headroom must be in"),
        ({"maximum": 8, "search": "linear"}, r"search must be 'binary' or 'power', got 'linear'"),
        ({"maximum": 8, "divides": 0}, r"divides must be a positive"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        search_micro_batch_size(lambda size: True, **arguments)
