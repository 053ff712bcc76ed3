"""The int that shifts Lightning's modulo to the start of a window."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bigopt.batching import WindowLength


@given(st.lists(st.integers(1, 7), min_size=1, max_size=12))
def test_each_consecutive_window_zeroes_and_steps_once(lengths):
    """Evaluates the expressions of Lightning for any sequence of lengths."""
    batch, zeroed, stepped = 0, [], []
    for length in lengths:
        window = WindowLength(length, batch)
        for _ in range(length):
            if batch % window == 0:
                zeroed.append(batch)
            if (batch + 1) % window == 0:
                stepped.append(batch)
            batch += 1
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    assert zeroed == starts
    assert stepped == [start + length - 1 for start, length in zip(starts, lengths, strict=True)]


def test_all_operations_except_the_modulo_are_those_of_int():
    window = WindowLength(4, 10)
    assert isinstance(window, int)
    assert (window == 4, 10.0 / window, window + 1, window < 9) == (True, 2.5, 5, True)
    assert (str(window), f"{window}", repr(window)) == ("4", "4", "WindowLength(4, 10)")
    assert hash(window) == hash(4)
    assert list(range(window)) == [0, 1, 2, 3]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_and_copy(protocol):
    window = WindowLength(3, 5)
    for twin in (pickle.loads(pickle.dumps(window, protocol)), copy.deepcopy(window)):
        assert type(twin) is WindowLength
        assert (int(twin), twin.start, 5 % twin) == (3, 5, 0)


@pytest.mark.parametrize(("length", "start"), [(0, 0), (-1, 0), (1, -1)])
def test_invalid_arguments_raise(length, start):
    with pytest.raises(ValueError, match=r"(length|start) must be"):
        WindowLength(length, start)
