"""Policies: what they name, what they refuse."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bigopt.batching import (
    BatchContext,
    BatchSizePolicy,
    BatchSizeRamp,
    BatchSizeSteps,
    ConstantBatchSize,
    FullBatch,
    NoiseScaleBatchSize,
    SchedulePolicy,
    SeesawBatchSize,
    SingleSample,
)
from lightning_bigopt.durations import Progress
from lightning_bigopt.schedules import Constant, Linear, Seesaw, WarmupLinear

ALL = (
    ConstantBatchSize(96),
    FullBatch(),
    SingleSample(),
    BatchSizeSteps({"0%": 8, "30%": 64, "500 steps": 16, "3 epochs": 7}),
    BatchSizeSteps("0:768 250B:1536"),
    BatchSizeRamp(start=32, end=512, over="30%"),
    BatchSizeRamp(start=512, end=32, over="1e4 samples", increment=48),
    SchedulePolicy(Linear(start=0.0, end=3.0), base=64),
    NoiseScaleBatchSize(32, high=512, shrink="allow"),
)


@given(
    policy=st.sampled_from(ALL),
    fraction=st.floats(0, 2),
    steps=st.integers(0, 10**6),
    samples=st.integers(0, 10**13),
    in_force=st.none() | st.integers(32, 512),
    noise_scale=st.none() | st.floats(),
)
def test_any_policy_names_a_positive_int(
    *, policy, fraction, steps, samples, in_force, noise_scale
):
    progress = Progress(
        fraction=fraction, steps=steps, epochs=samples / 997, samples=samples, tokens=9 * samples
    )
    context = BatchContext(
        samples_per_epoch=997, global_batch_size=in_force, noise_scale=noise_scale
    )
    size = policy(progress, context=context)
    assert isinstance(size, int)
    assert size > 0
    assert policy(progress, context=context) == size


@pytest.mark.parametrize("policy", ALL, ids=lambda policy: type(policy).__name__)
def test_policies_are_values(policy):
    progress = Progress(fraction=0.4, steps=7)
    policy(progress, context=BatchContext(samples_per_epoch=3))
    twin = pickle.loads(pickle.dumps(policy))
    assert twin == policy
    assert hash(twin) == hash(policy)
    assert eval(repr(policy)) == policy
    with pytest.raises(AttributeError):
        policy.size = 3


# ----------------------------------------------------------------------------------- steps


def test_last_threshold_reached_wins_in_written_order_over_all_units():
    policy = BatchSizeSteps({"0%": 1, "50%": 2, "10 steps": 3, "100 samples": 4})
    assert policy(Progress(fraction=0.0)) == 1
    assert policy(Progress(fraction=0.6)) == 2
    assert policy(Progress(fraction=0.1, steps=10)) == 3
    assert policy(Progress(fraction=0.6, steps=10)) == 3
    assert policy(Progress(fraction=0.0, samples=100)) == 4
    assert policy(Progress(fraction=1.0, steps=10, samples=99)) == 3


@pytest.mark.parametrize("total", [10, 30, 333, 997])
def test_a_share_is_reached_at_its_own_update_whatever_the_rounding(total):
    for percent in range(1, 100):
        policy = BatchSizeSteps({"0%": 1, f"{percent}%": 2})
        first = next(t for t in range(total + 1) if policy(Progress(fraction=t / total)) == 2)
        assert first == -(-percent * total // 100)


def test_steps_read_megatrons_string():
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
def test_bad_steps_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        BatchSizeSteps(sizes)


# ------------------------------------------------------------------------------------ ramp


def megatron_ramp(start, increment, ramp_samples, end, consumed):
    """Megatron's arithmetic, as the conventions of the field state it."""
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
def test_ramp_in_samples_is_megatrons(start, increment, increments, each, consumed):
    end, over = start + increment * increments, each * increments
    ramp = BatchSizeRamp(start=start, end=end, over=f"{over} samples", increment=increment)
    expected = megatron_ramp(start, increment, over, end, consumed)
    assert ramp(Progress(fraction=0.0, samples=consumed)) == expected


def test_ramp_in_other_units_gives_each_increment_an_equal_share():
    ramp = BatchSizeRamp(32, end=128, over="30%", increment=32)
    sizes = [ramp(Progress(fraction=t / 100)) for t in range(101)]
    assert sizes == [32] * 10 + [64] * 10 + [96] * 10 + [128] * 71


def test_ramp_without_increment_changes_one_sample_at_a_time_either_way():
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
def test_bad_ramps_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchSizeRamp(**arguments)


# ------------------------------------------------------------------------ the simple ones


def test_full_batch_needs_a_length():
    assert FullBatch()(Progress(fraction=0.3), context=BatchContext(samples_per_epoch=5)) == 5
    for context in (None, BatchContext()):
        with pytest.raises(ValueError, match=r"samples_per_epoch must be known for FullBatch"):
            FullBatch()(Progress(fraction=0.3), context=context)


@pytest.mark.parametrize("size", [0, -8, 2.0, "8", None, True])
def test_constant_refuses_what_is_no_size(size):
    with pytest.raises(ValueError, match=r"size must be a positive number of samples, got"):
        ConstantBatchSize(size)


@pytest.mark.parametrize(
    ("policy", "units"),
    [
        (ConstantBatchSize(8), set()),
        (BatchSizeSteps({"0 tokens": 8, "50%": 16}), {"fraction"}),
        (BatchSizeSteps("0:8 1K:16 50%:32"), {"tokens", "fraction"}),
        (BatchSizeRamp(start=8, end=16, over="3 epochs"), {"epochs"}),
    ],
)
def test_units_tells_what_is_read(policy, units):
    assert policy.units == units


def test_own_policy_needs_one_method():
    class Mine(BatchSizePolicy):
        def __call__(self, progress, *, context=None):
            return 3

    assert Mine()(Progress(fraction=0.0)) == 3
    assert not Mine.adaptive
    assert Mine.rounding == "exact"
    with pytest.raises(TypeError, match="abstract"):
        BatchSizePolicy()


# ---------------------------------------------------------------------- along a schedule


class Trader(Linear):
    def batch_factor(self, fraction):
        return 2.0 if fraction >= 0.5 else 1.0


def test_schedule_policy_multiplies_the_base():
    policy = SchedulePolicy(Linear(start=1.0, end=4.0), base=100)
    sizes = [policy(Progress(fraction=f)) for f in (0.0, 0.333, 1.0, 5.0)]
    assert sizes == [100, 200, 400, 400]
    assert SchedulePolicy(Linear(), base=8)(Progress(fraction=1.0)) == 1


def test_seesaw_reads_the_batch_factor():
    policy = SeesawBatchSize(Trader(), base=48)
    assert [policy(Progress(fraction=f)) for f in (0.0, 0.5)] == [48, 96]
    capped = SeesawBatchSize(Seesaw(Linear()), base=48)
    assert [capped(Progress(fraction=f)) for f in (0.75, 0.9, 1.0)] == [192, 384, 384]


@pytest.mark.parametrize("kind", [SchedulePolicy, SeesawBatchSize])
def test_bad_schedules_are_refused(kind):
    with pytest.raises(ValueError, match=r"schedule must be a Schedule, got 3"):
        kind(3, base=8)
    with pytest.raises(ValueError, match=r"durations in percent in a batch-size policy"):
        kind(WarmupLinear(warmup="10 steps"), base=8)
    with pytest.raises(ValueError, match=r"base must be a positive number"):
        kind(Trader(), base=0)
    with pytest.raises(ValueError, match=r"schedule must be a Seesaw.*SchedulePolicy"):
        SeesawBatchSize(Linear(), base=8)


# ----------------------------------------------------------------------------- noise scale


def decide(policy, in_force, noise_scale):
    context = BatchContext(global_batch_size=in_force, noise_scale=noise_scale)
    return policy(Progress(fraction=0.1), context=context)


@given(
    in_force=st.integers(32, 512),
    noise_scale=st.floats(allow_nan=True, allow_infinity=True),
    multiple=st.floats(0.1, 10),
)
def test_noise_scale_policy_never_shrinks_unasked_and_keeps_its_bounds(
    in_force, noise_scale, multiple
):
    policy = NoiseScaleBatchSize(32, high=512, multiple=multiple)
    size = decide(policy, in_force, noise_scale)
    assert in_force <= size <= min(512, 2 * in_force)


def test_noise_scale_policy_moves_late_and_by_bounded_steps():
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


def test_a_noise_scale_between_two_sizes_does_not_flutter():
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
        ({"high": 64, "multiple": 0}, r"multiple must be positive, got 0"),
        ({"high": 64, "hysteresis": 1.0}, r"hysteresis must be above 1, got 1.0"),
        ({"high": 64, "growth": 1.2}, r"growth must be at least hysteresis = 1.5, got 1.2"),
        ({"high": 64, "shrink": "maybe"}, r"shrink must be 'never' or 'allow', got 'maybe'"),
    ],
)
def test_bad_noise_scale_policies_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NoiseScaleBatchSize(32, **arguments)


def test_a_schedule_that_never_changes_is_no_policy():
    with pytest.raises(ValueError, match=r"schedule must change.*use ConstantBatchSize\(128\)"):
        SchedulePolicy(Constant(0.5), base=256)
