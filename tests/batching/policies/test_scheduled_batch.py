"""Batch sizes that follow a schedule."""

from __future__ import annotations

import pytest

from lightning_bigopt.batching import (
    SchedulePolicy,
    SeesawBatchSize,
)
from lightning_bigopt.durations import Progress
from lightning_bigopt.schedules import Constant, Linear, Seesaw, WarmupLinear


class WithBatchFactor(Linear):
    def batch_factor(self, fraction):
        return 2.0 if fraction >= 0.5 else 1.0


def test_schedule_policy_multiplies_the_base():
    policy = SchedulePolicy(Linear(start=1.0, end=4.0), base=100)
    sizes = [policy(Progress(fraction=f)) for f in (0.0, 0.333, 1.0, 5.0)]
    assert sizes == [100, 200, 400, 400]
    assert SchedulePolicy(Linear(), base=8)(Progress(fraction=1.0)) == 1


def test_seesaw_multiplies_the_base_by_the_batch_factor():
    policy = SeesawBatchSize(WithBatchFactor(), base=48)
    assert [policy(Progress(fraction=f)) for f in (0.0, 0.5)] == [48, 96]
    capped = SeesawBatchSize(Seesaw(Linear()), base=48)
    assert [capped(Progress(fraction=f)) for f in (0.75, 0.9, 1.0)] == [192, 384, 384]


@pytest.mark.parametrize("kind", [SchedulePolicy, SeesawBatchSize])
def test_invalid_schedules_raise(kind):
    with pytest.raises(ValueError, match=r"schedule must be a Schedule, got 3"):
        kind(3, base=8)
    with pytest.raises(ValueError, match=r"durations in percent in a batch-size policy"):
        kind(WarmupLinear(warmup="10 steps"), base=8)
    with pytest.raises(ValueError, match=r"base must be a positive number"):
        kind(WithBatchFactor(), base=0)
    with pytest.raises(ValueError, match=r"schedule must be a Seesaw.*SchedulePolicy"):
        SeesawBatchSize(Linear(), base=8)


def test_constant_schedule_raises():
    with pytest.raises(ValueError, match=r"schedule must change.*use ConstantBatchSize\(128\)"):
        SchedulePolicy(Constant(0.5), base=256)
