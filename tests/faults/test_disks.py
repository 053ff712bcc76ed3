"""A few of the cases of disks; benchmarks/faults.py runs all of them, also on real file systems."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.disks import HOOKS, end_of, problems, run_case, saves_in_vain

pytestmark = pytest.mark.slow
FULL, FILE, DELETED = "full (limit of the file size)", "a file in its place", "deleted"


@pytest.mark.parametrize(
    ("writer", "fault"),
    [
        ("ModelCheckpoint", FULL),
        ("ModelCheckpoint(save_last=True)", FULL),
        ("ModelCheckpoint(save_last=True)", FILE),
        ("ModelCheckpoint", DELETED),
        ("TensorBoardLogger", FULL),
        ("CSVLogger", FULL),
        ("OptimizationMonitor(report=)", FILE),
        ("StepGuard(forensics=)", DELETED),
        ("default_root_dir", DELETED),
    ],
)
def test_run_goes_on_or_ends_with_an_error_and_checkpoints_stay_intact(
    writer: str, fault: str
) -> None:
    outcome = run_case(writer, fault)
    assert problems(outcome) == []
    if writer.startswith("ModelCheckpoint"):
        assert (end_of(outcome) == "finished") is (fault == DELETED)
        assert len(outcome.records) > 2  # checkpoints were resumed


def test_error_of_the_module_is_not_replaced() -> None:
    outcome = run_case("OptimizationMonitor(report=)", FILE, raises=True)
    assert problems(outcome, raises=True) == []
    assert end_of(outcome) == "LookupError"


@pytest.mark.filterwarnings("ignore:A checkpoint is saved during an update")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("hook", HOOKS)
def test_failed_save_that_is_caught_changes_nothing(hook: str, first: bool, tmp_path: Path) -> None:
    is_equal, failed = saves_in_vain(hook, tmp_path, first=first)
    assert is_equal
    assert failed >= 1
