"""Batch sizes that change at thresholds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bigopt.batching import (
    BatchSizeRamp,
    BatchSizeSteps,
)
from lightning_bigopt.durations import Progress

# ----------------------------------------------------------------------------------- steps


def test_last_threshold_reached_applies_in_written_order_over_all_units():
    policy = BatchSizeSteps({"0%": 1, "50%": 2, "10 steps": 3, "100 samples": 4})
    assert policy(Progress(fraction=0.0)) == 1
    assert policy(Progress(fraction=0.6)) == 2
    assert policy(Progress(fraction=0.1, steps=10)) == 3
    assert policy(Progress(fraction=0.6, steps=10)) == 3
    assert policy(Progress(fraction=0.0, samples=100)) == 4
    assert policy(Progress(fraction=1.0, steps=10, samples=99)) == 3


@pytest.mark.parametrize("total", [10, 30, 333, 997])
def test_percentage_is_reached_at_its_update_for_every_total(total):
    for percent in range(1, 100):
        policy = BatchSizeSteps({"0%": 1, f"{percent}%": 2})
        first = next(t for t in range(total + 1) if policy(Progress(fraction=t / total)) == 2)
        assert first == -(-percent * total // 100)


def test_steps_parse_the_format_of_megatron():
    policy = BatchSizeSteps("0:768 250B:1536 500B:3072")
    assert policy == BatchSizeSteps({"0 tokens": 768, "250B tokens": 1536, "500B tokens": 3072})
    tokens = 250 * 10**9
    assert policy(Progress(fraction=0.1, tokens=tokens - 1)) == 768
    assert policy(Progress(fraction=0.1, tokens=tokens)) == 1536
    assert policy(Progress(fraction=0.1, samples=10**15, tokens=0)) == 768
    by_samples = BatchSizeSteps.parse("0:8 1.5K:16 30%:32", unit="samples")
    assert by_samples(Progress(fraction=0.0, samples=1500)) == 16
    assert by_samples(Progress(fraction=0.3, samples=0)) == 32


def test_steps_may_be_given_as_pairs_and_numbers():
    expected = BatchSizeSteps({0: 8, 500: 16})
    assert BatchSizeSteps([(0, 8), (500, 16)]) == expected
    assert BatchSizeSteps(((0, 8), (500, 16))) == expected
    assert expected(Progress(fraction=0.1, steps=500)) == 16
    assert BatchSizeSteps({0.0: 8, 0.5: 16})(Progress(fraction=0.5)) == 16


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, r"sizes must not be empty"),
        ("", r"sizes must not be empty"),
        ({"10%": 8}, r"sizes must start at zero, got '10%'.*put '0%' before it"),
        ({"50%": 8, "0%": 16}, r"sizes must start at zero, got '50%'"),
        ({"0%": 8, "50%": 0}, r"sizes\['50%'\] must be a positive number of samples, got 0"),
        ({"0%": 8, "50%": 2.5}, r"sizes\['50%'\] must be .*, got 2.5"),
        ({"0%": True, "50%": 2}, r"sizes\['0%'\] must be .*, got True"),
        ({"0%": 8, "50%": 16, "30%": 32}, r"ascending thresholds in fraction, got '30%' after 50%"),
        ({"0%": 8, "50%": 16, "soon": 32}, r"threshold of sizes must be a duration"),
        ({"0%": 8, "50%": 8}, r"sizes must change, got 8 .*ConstantBatchSize\(8\)"),
        ({"0%": 8}, r"sizes must change"),
        ("0:8 nonsense", r"pairs 'threshold:size'.*got 'nonsense'.*write '0:768 250B:1536'"),
        ("0:8 10X:16", r"got '10X:16'"),
    ],
)
def test_invalid_steps_raise(sizes, message):
    with pytest.raises(ValueError, match=message):
        BatchSizeSteps(sizes)


# ------------------------------------------------------------------------------------ ramp


def megatron_ramp(start, increment, ramp_samples, end, consumed):
    """Computes the ramp with Megatron's formula."""
    increments = (end - start) // increment
    if consumed > ramp_samples:
        return end
    return start + int(consumed / (ramp_samples / increments)) * increment


@given(
    start=st.integers(1, 64),
    increment=st.integers(1, 16),
    increments=st.integers(1, 20),
    each=st.integers(1, 1000),
    consumed=st.integers(0, 30_000),
)
def test_ramp_in_samples_equals_megatron(start, increment, increments, each, consumed):
    end, over = start + increment * increments, each * increments
    ramp = BatchSizeRamp(start=start, end=end, over=f"{over} samples", increment=increment)
    expected = megatron_ramp(start, increment, over, end, consumed)
    assert ramp(Progress(fraction=0.0, samples=consumed)) == expected


def test_ramp_in_other_units_has_increments_of_equal_length():
    ramp = BatchSizeRamp(32, end=128, over="30%", increment=32)
    sizes = [ramp(Progress(fraction=t / 100)) for t in range(101)]
    assert sizes == [32] * 10 + [64] * 10 + [96] * 10 + [128] * 71


def test_ramp_without_increment_changes_by_one_sample_up_or_down():
    up = BatchSizeRamp(start=10, end=20, over="10 steps")
    down = BatchSizeRamp(start=20, end=10, over="10 steps")
    progress = [Progress(fraction=0.0, steps=n) for n in range(12)]
    assert [up(p) for p in progress] == [*range(10, 21), 20]
    assert [down(p) for p in progress] == [*range(20, 9, -1), 10]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 0, "end": 8, "over": "10%"}, r"start must be a positive .*got 0"),
        ({"start": 8, "end": -1, "over": "10%"}, r"end must be a positive .*got -1"),
        ({"start": 8, "end": 8, "over": "10%"}, r"end must differ .*ConstantBatchSize\(8\)"),
        ({"start": 8, "end": 16, "over": 0}, r"over must be positive, got 0"),
        ({"start": 8, "end": 16, "over": "soon"}, r"over must be a duration .*got 'soon'"),
        (
            {"start": 8, "end": 20, "over": "10%", "increment": 5},
            r"increment must divide end - start = 12, got 5; write 4",
        ),
        ({"start": 8, "end": 20, "over": "1%", "increment": 0}, r"increment must be a positive"),
    ],
)
def test_invalid_ramps_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchSizeRamp(**arguments)
