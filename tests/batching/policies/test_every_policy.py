"""Properties of every batch-size policy, and the base class."""

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
    SingleSample,
)
from lightning_bigopt.durations import Progress
from lightning_bigopt.schedules import Linear

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
    current=st.none() | st.integers(32, 512),
    noise_scale=st.none() | st.floats(),
)
def test_every_policy_returns_a_positive_int(
    *, policy, fraction, steps, samples, current, noise_scale
):
    progress = Progress(
        fraction=fraction, steps=steps, epochs=samples / 997, samples=samples, tokens=9 * samples
    )
    context = BatchContext(
        samples_per_epoch=997, global_batch_size=current, noise_scale=noise_scale
    )
    size = policy(progress, context=context)
    assert isinstance(size, int)
    assert size > 0
    assert policy(progress, context=context) == size


@pytest.mark.parametrize("policy", ALL, ids=lambda policy: type(policy).__name__)
def test_policies_are_immutable_values(policy):
    progress = Progress(fraction=0.4, steps=7)
    policy(progress, context=BatchContext(samples_per_epoch=3))
    twin = pickle.loads(pickle.dumps(policy))
    assert twin == policy
    assert hash(twin) == hash(policy)
    assert eval(repr(policy)) == policy
    with pytest.raises(AttributeError):
        policy.size = 3


@pytest.mark.parametrize(
    ("policy", "units"),
    [
        (ConstantBatchSize(8), set()),
        (BatchSizeSteps({"0 tokens": 8, "50%": 16}), {"fraction"}),
        (BatchSizeSteps("0:8 1K:16 50%:32"), {"tokens", "fraction"}),
        (BatchSizeRamp(start=8, end=16, over="3 epochs"), {"epochs"}),
    ],
)
def test_units_are_those_of_the_thresholds(policy, units):
    assert policy.units == units


def test_user_policy_needs_one_method():
    class UserPolicy(BatchSizePolicy):
        def __call__(self, progress, *, context=None):
            return 3

    assert UserPolicy()(Progress(fraction=0.0)) == 3
    assert not UserPolicy.adaptive
    assert UserPolicy.rounding == "exact"
    with pytest.raises(TypeError, match="abstract"):
        BatchSizePolicy()


@pytest.mark.parametrize(
    ("old", "new"), [("staircase", "step_function"), ("written_sizes", "explicit_sizes")]
)
def test_policy_with_a_method_name_of_version_0_1_raises(old, new):
    with pytest.raises(
        ValueError, match=rf"UserPolicy must override {new}, got its old name {old}"
    ):
        type("UserPolicy", (ConstantBatchSize,), {old: lambda self: {}})
