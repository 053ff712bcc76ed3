"""Runs that SLURM's signal requeues at random moments equal uninterrupted ones to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.killed_training import Case
from tests.faults.slurm import requeued_and_compared


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["stateful", "exact"])
def test_requeued_run_equals_uninterrupted_run(loader: str, tmp_path: Path) -> None:
    case = Case(loader, "32-true", "BatchNorm", True, 7, requeue_signal="SIGUSR1", pause=0.0)
    result, _ = requeued_and_compared(case, tmp_path, signals=3, seed=0)
    assert result.differences == []
    assert result.kills


@pytest.mark.slow
@pytest.mark.distributed
def test_requeued_run_of_two_processes_equals_uninterrupted_run(tmp_path: Path) -> None:
    case = Case("exact", "32-true", "BatchNorm", True, 0, 2, requeue_signal="SIGUSR1", pause=0.0)
    result, _ = requeued_and_compared(case, tmp_path, signals=2, seed=0)
    assert result.differences == []
    assert result.kills
