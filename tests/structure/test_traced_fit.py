"""Few files run in one steady step."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest

import lightning_bigopt
from lightning_bigopt import Cosine, LearningRateScheduler, Schedule, WarmupStableDecay
from tests.structure.traced_fit import step_trace

PACKAGE = Path(lightning_bigopt.__file__).parent


def trace_of(schedule: Schedule):
    def callbacks() -> list[L.Callback]:
        return [LearningRateScheduler(schedule)]

    return step_trace(PACKAGE, callbacks)


@pytest.mark.parametrize("schedule", [Cosine(), WarmupStableDecay(warmup="20%", decay="20%")])
def test_a_step_runs_through_few_files(schedule: Schedule):
    trace = trace_of(schedule)
    assert "engine/step.py" in trace.files
    without_schedules = {file for file in trace.files if not file.startswith("schedules/")}
    assert len(without_schedules) <= 5, sorted(trace.files)


def test_a_step_with_a_simple_schedule_runs_through_seven_files():
    trace = trace_of(Cosine())
    assert len(trace.files) <= 7, sorted(trace.files)
    assert len(trace.chain) <= 6, trace.chain
