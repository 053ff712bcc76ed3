"""Seesaw: the learning rate and the batch factor."""

from __future__ import annotations

import pytest

from lightning_bigopt.durations import Horizon
from lightning_bigopt.schedules import (
    Constant,
    Linear,
    Product,
    Seesaw,
    WarmupCosine,
    WarmupLinear,
    WarmupStableDecay,
)

RUN = Horizon.of_steps(1000, samples_per_step=10, steps_per_epoch=100)


def test_stable_phase_is_unchanged():
    seesaw = Seesaw(WarmupStableDecay(warmup="10%", decay="50%", cooldown="linear"))
    assert [seesaw(f) for f in (0.05, 0.1, 0.4)] == pytest.approx([0.5, 1.0, 1.0])
    assert [seesaw.batch_factor(f) for f in (0.05, 0.1, 0.4)] == [1.0, 1.0, 1.0]
    assert (seesaw(0.875), seesaw.batch_factor(0.875)) == pytest.approx((0.5, 4.0))


def test_decay_is_relative_to_the_peak():
    seesaw = Seesaw(Product([Constant(0.36), WarmupLinear(warmup="50%")]))
    assert seesaw(0.25) == pytest.approx(0.18)
    assert seesaw(0.875) == pytest.approx(0.36 * 0.5)
    assert seesaw.batch_factor(0.875) == pytest.approx(4.0)


def test_beyond_the_cap_the_factor_falls_fully():
    seesaw = Seesaw(Linear(), max_batch_factor=4.0)
    assert (seesaw(0.75), seesaw.batch_factor(0.75)) == (0.5, 4.0)
    assert seesaw(0.9) == pytest.approx(0.1 * 2.0)
    assert seesaw.batch_factor(0.9) == seesaw.batch_factor(1.0) == 4.0
    assert seesaw(1.0) == 0.0
    for cap in (0.5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"max_batch_factor must be in \[1, inf\), got"):
            Seesaw(Linear(), max_batch_factor=cap)


def test_schedule_of_zero_keeps_the_batch():
    assert Seesaw(Constant(0.0)).batch_factor(0.5) == 1.0
    assert Seesaw(Constant(0.0))(0.5) == 0.0


def test_batch_factor_is_flat_beyond_the_budget():
    assert Seesaw(Linear(end=0.25)).batch_factor(5.0) == 4.0


def test_schedule_that_rises_again_raises():
    from lightning_bigopt.schedules import CosineWithRestarts

    with pytest.raises(ValueError, match="schedule must only fall after its peak"):
        Seesaw(CosineWithRestarts(first_cycle="25%")).resolve(RUN)


def test_resolves_its_inner_schedule():
    resolved = Seesaw(WarmupCosine(warmup=100)).resolve(RUN)
    assert resolved == Seesaw(WarmupCosine(warmup="10%"))
