"""RollBack: its checks, its trigger against NumPy, and YAML."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from jsonargparse import ArgumentParser

from lightning_bigopt import RollBack, StepGuard


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"snapshot_every": 0}, "snapshot_every must be positive, got 0; write '1%' or 100"),
        ({"recover": "two"}, "recover must be a duration"),
        ({"keep": 0}, "keep must be a positive number of snapshots, got 0"),
        ({"lr_factor": 0.0}, r"lr_factor must be in \(0, 1\], got 0.0; try 0.5"),
        ({"at_most": 0}, "at_most must be a positive number of rollbacks, got 0"),
        ({"to": None}, "to must be 'memory' or a local folder, got None"),
        ({"to": ""}, "to must be 'memory' or a local folder, got ''"),
        ({"to": 3}, "to must be 'memory' or a local folder, got 3"),
        ({"to": "s3://bucket/x"}, "to must be 'memory' or a local folder, got 's3://bucket/x'"),
        ({"floor": 0}, "floor must be positive and finite, got 0; try 0.01"),
        ({"threshold": -1.0}, "threshold must be"),
        ({"updates": 0}, "updates must be a positive integer"),
        ({"skip_data": "no"}, "skip_data must be"),
        ({"floor": 0}, "floor must be"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RollBack(**options)


def test_the_guard_takes_a_roll_back_only() -> None:
    with pytest.raises(ValueError, match="roll_back must be"):
        StepGuard(roll_back="1%")  # type: ignore[arg-type]


def test_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(StepGuard, "guard")
    config = parser.parse_string(
        "guard:\n  roll_back:\n    class_path: lightning_bigopt.RollBack\n"
        "    init_args: {snapshot_every: 2%, lr_factor: 0.5, to: snapshots}\n"
    )
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    found = instantiate(config).guard
    assert found.roll_back == RollBack(snapshot_every="2%", lr_factor=0.5, to="snapshots")
    assert "RollBack(snapshot_every='2%'" in found.specification()


def test_the_trigger_is_that_of_the_formula() -> None:
    """NumPy computes the smoothed loss and its limit from all losses at once."""
    rng = np.random.default_rng(0)
    losses = [*(3.0 - 0.002 * np.arange(200) + 0.1 * rng.standard_normal(200)), *[4.0] * 20]
    spec = RollBack(updates=5, threshold=4.0)
    state, given = spec.initial_state(), [*losses[:100], math.nan, *losses[100:]]
    found = [spec.observe(float(loss), state) is not None for loss in given]
    del found[100]
    smoothed, usual, expected, above = losses[0], [], [], 0
    for number, loss in enumerate(losses):
        smoothed = loss if number == 0 else smoothed + (loss - smoothed) / 3
        limit = math.inf
        if len(usual) >= 64:
            recent = np.array(usual[-128:])
            sigma = 1.4826 / math.sqrt(2) * np.median(np.abs(np.diff(recent)))
            middle = np.median(recent[-32:])
            limit = middle + 4.0 * max(sigma, 0.01 * abs(middle))
        above = above + 1 if smoothed > limit else 0
        if max(smoothed, loss) <= limit:
            usual.append(loss)
        expected.append(above >= 5)
    assert found == expected
    assert found.index(True) == 204  # above the limit from update 200 on
