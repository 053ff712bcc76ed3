"""Names of version 0.1 raise errors that give the new spelling."""

from __future__ import annotations

import re

import pytest

from lightning_bigopt import (
    Abort,
    BatchSizeSteps,
    GradientClipping,
    LearningRateRangeTest,
    Linear,
    NormClip,
    Skip,
)
from lightning_bigopt.gradients import ClipDecision

POLICY = BatchSizeSteps({"0%": 16, "50%": 32})
REMOVED = [
    (Linear(), "value", "write base * schedule(fraction)"),
    (Linear(), "as_lr_scheduler", "as_lr_scheduler(schedule, optimizer, horizon)"),
    (Linear(), "needs_base", "a schedule is only a factor"),
    (Linear(), "scaled", "write base * schedule(fraction)"),
    (POLICY, "staircase", "write step_function"),
    (POLICY, "written_sizes", "write explicit_sizes"),
    (NormClip(), "measures", "write norm_order"),
    (ClipDecision(), "parts", "write by_pattern"),
    (ClipDecision(), "write", "write write_gradients"),
    (ClipDecision(), "by_group", "write each_group"),
    (Skip(), "initial_state", "only Backoff has a state"),
    (Abort(), "accept", "StepGuard counts the rejections"),
    (Abort(), "reject", "StepGuard counts the rejections"),
    (GradientClipping(NormClip()), "controller", "write callback.x instead"),
    (LearningRateRangeTest(), "say", "read .result"),
]


@pytest.mark.parametrize(
    ("owner", "name", "advice"), REMOVED, ids=[f"{type(o).__name__}.{n}" for o, n, _ in REMOVED]
)
def test_removed_name_raises_with_the_new_spelling(owner: object, name: str, advice: str) -> None:
    text = rf"{type(owner).__name__}\.{name} was removed in lightning_bigopt 0\.2; "
    with pytest.raises(AttributeError, match=text + ".*" + re.escape(advice)):
        getattr(owner, name)
    with pytest.raises(AttributeError, match=re.escape(advice)):
        getattr(type(owner), name)
    assert not hasattr(owner, name)
