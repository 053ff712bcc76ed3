"""Runs that are killed at random moments and resumed equal uninterrupted ones to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.killed_training import Case
from tests.faults.kills import killed_and_compared

CASES = [
    Case("stateful", "32-true", "BatchNorm", guard=True, number=6),
    Case("exact", "16-mixed", "BatchNorm", guard=True, number=3),
    Case("exact", "bf16-mixed", "BatchNorm", guard=False, number=4),
    Case("exact, 2 workers", "32-true", "LayerNorm", guard=True, number=8),
]


@pytest.mark.slow
@pytest.mark.parametrize(("way", "case"), list(enumerate(CASES)), ids=str)
def test_killed_run_equals_uninterrupted_run(way: int, case: Case, tmp_path: Path) -> None:
    result = killed_and_compared(case, tmp_path, kills=4, seed=way, way=way)
    assert result.differences == []
    assert result.kills


@pytest.mark.slow
@pytest.mark.distributed
def test_killed_run_of_two_processes_equals_uninterrupted_run(tmp_path: Path) -> None:
    case = Case("exact", "32-true", "BatchNorm", guard=True, number=0, processes=2)
    result = killed_and_compared(case, tmp_path, kills=3, seed=0)
    assert result.differences == []
    assert result.kills
