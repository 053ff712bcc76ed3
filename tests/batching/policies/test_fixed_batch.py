"""Policies whose size never changes."""

from __future__ import annotations

import pytest

from lightning_bigopt.batching import (
    BatchContext,
    ConstantBatchSize,
    FullBatch,
)
from lightning_bigopt.durations import Progress


def test_full_batch_needs_a_length():
    assert FullBatch()(Progress(fraction=0.3), context=BatchContext(samples_per_epoch=5)) == 5
    for context in (None, BatchContext()):
        with pytest.raises(ValueError, match=r"samples_per_epoch must be known for FullBatch"):
            FullBatch()(Progress(fraction=0.3), context=context)


@pytest.mark.parametrize("size", [0, -8, 2.0, "8", None, True])
def test_constant_batch_size_raises_for_an_invalid_size(size):
    with pytest.raises(ValueError, match=r"size must be a positive number of samples, got"):
        ConstantBatchSize(size)


def test_explicit_sizes_are_named_by_their_argument():
    assert ConstantBatchSize(3).explicit_sizes == {"size": 3}
