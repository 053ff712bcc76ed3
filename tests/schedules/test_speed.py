"""The time to evaluate a schedule, with a generous limit for a busy machine."""

from __future__ import annotations

import sys
import timeit

import pytest

from lightning_bigopt import schedules
from lightning_bigopt.schedules import (
    Chain,
    Clamp,
    Constant,
    Cosine,
    CosineWithRestarts,
    Cyclic,
    InfiniteSchedule,
    Linear,
    MultiStep,
    Product,
    Schedule,
    Seesaw,
    Warmup,
    WarmupCosine,
    WarmupStableDecay,
)

TARGET_US = 3.0
ROOM = 10.0

COMPOSED = [
    Chain([("30%", Constant()), ("20%", Linear(end=0.5)), Cosine(start=0.5)]),
    Clamp(WarmupCosine(), low=0.1),
    Cyclic(mode="exp_range"),
    CosineWithRestarts(cycle_multiplier=2.0, cycle_decay=0.5),
    InfiniteSchedule(cooldown="20%"),
    Product([WarmupCosine(), MultiStep()]),
    Seesaw(WarmupStableDecay()),
    Warmup("5%", Chain([("30%", Constant()), Linear()])),
]
NEED_ARGUMENTS = {"Schedule", "Chain", "Clamp", "Product", "Seesaw", "Warmup"}
PLAIN = [getattr(schedules, name)() for name in schedules.__all__ if name not in NEED_ARGUMENTS]


@pytest.mark.parametrize("schedule", [*PLAIN, *COMPOSED], ids=lambda s: type(s).__name__)
def test_factor_takes_microseconds(schedule: Schedule):
    schedule(0.0)
    best = max(
        min(timeit.repeat(lambda f=moment: schedule(f), number=100, repeat=30)) / 100 * 1e6
        for moment in (0.01, 0.5, 0.95)
    )
    sys.stdout.write(f"{type(schedule).__name__:24} {best:5.2f} µs (target {TARGET_US} µs)\n")
    assert best < TARGET_US * ROOM
