"""Batch sizes that follow the gradient noise scale."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bigopt.batching import (
    BatchContext,
    NoiseScaleBatchSize,
)
from lightning_bigopt.durations import Progress


def decide(policy, current, noise_scale):
    context = BatchContext(global_batch_size=current, noise_scale=noise_scale)
    return policy(Progress(fraction=0.1), context=context)


@given(
    current=st.integers(32, 512),
    noise_scale=st.floats(allow_nan=True, allow_infinity=True),
    multiple=st.floats(0.1, 10),
)
def test_size_does_not_shrink_by_default_and_stays_within_bounds(current, noise_scale, multiple):
    policy = NoiseScaleBatchSize(32, high=512, multiple=multiple)
    size = decide(policy, current, noise_scale)
    assert current <= size <= min(512, 2 * current)


def test_size_changes_after_hysteresis_and_by_bounded_steps():
    policy = NoiseScaleBatchSize(32, high=512, hysteresis=1.5, growth=2.0, shrink="allow")
    assert decide(policy, None, 300.0) == 32
    assert decide(policy, 64, 95.0) == 64
    assert decide(policy, 64, 96.0) == 96
    assert decide(policy, 64, 1e9) == 128
    assert decide(policy, 400, 1e9) == 512
    assert decide(policy, 512, 1e9) == 512
    assert decide(policy, 96, 65.0) == 96
    assert decide(policy, 96, 64.0) == 64
    assert decide(policy, 96, 1.0) == 48
    assert decide(policy, 40, 1.0) == 32
    for nothing in (None, float("nan"), float("inf"), -3.0, 0.0):
        assert decide(policy, 96, nothing) == 96


def test_noise_scale_between_two_sizes_does_not_oscillate():
    policy = NoiseScaleBatchSize(32, high=512, shrink="allow")
    size, seen = 32, []
    for turn in range(40):
        size = decide(policy, size, 100.0 if turn % 2 else 130.0)
        seen.append(size)
    assert len(set(seen[5:])) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"high": 32}, r"high must be more than low = 32, got 32"),
        ({"high": 64, "multiple": 0}, r"multiple must be positive and finite, got 0"),
        ({"high": 64, "hysteresis": 1.0}, r"hysteresis must be in \(1, inf\), got 1.0"),
        ({"high": 64, "growth": 1.2}, r"growth must be at least hysteresis = 1.5, got 1.2"),
        ({"high": 64, "shrink": "maybe"}, r"shrink must be 'never' or 'allow', got 'maybe'"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        NoiseScaleBatchSize(32, **arguments)
