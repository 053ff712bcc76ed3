"""study() on two processes: launched by Lightning, and by torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.torchrun import ROOT, results_of

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def launched_by_lightning(out: Path) -> list[dict[str, Any]]:
    run = subprocess.run(
        [sys.executable, "-m", "tests.distributed.study_scenarios", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-6000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module", params=["lightning", "torchrun"])
def processes(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Returns the results of both processes."""
    out = tmp_path_factory.mktemp(request.param)
    if request.param == "lightning":
        return launched_by_lightning(out)
    return results_of("study_scenarios", out, timeout=280)


def test_processes_train_the_same_values_and_agree_on_the_verdicts(processes: Any):
    first, second = processes
    assert [first["rank"], second["rank"]] == [0, 1]
    assert {k: v for k, v in first.items() if k != "rank"} == {
        k: v for k, v in second.items() if k != "rank"
    }
    by_rate = {trial[1]: trial for trial in first["trials"]}
    assert by_rate[0.05][0] == "complete"
    assert by_rate[0.2][:2] == ["pruned", 0.2]
    assert by_rate[0.2][3:5] == ["the pruner stopped it after 8 updates", 8]
    assert by_rate[1e20][3] in (
        "val_loss was inf after 4 updates",
        "val_loss was nan after 4 updates",
    )
    assert {fit["lr"]: fit["updates"] for fit in first["fits"]} == {0.05: 24, 0.2: 8, 1e20: 4}


def test_complete_trial_equals_a_plain_run_of_two_processes(processes: Any):
    by_rate = {trial[1]: trial for trial in processes[0]["trials"]}
    assert by_rate[0.05][2] == processes[0]["plain"]


def test_branches_of_a_trunk_equal_plain_runs_of_two_processes(processes: Any):
    for result in processes:
        assert result["curve"] == result["plain budgets"]
        (trial,) = result["trunk"]
        assert trial[4:6] == [9 + 3 + 15, 36 - 27]
        # The trunk, which is stopped at its fork, the branch of 12 updates, and the trunk again.
        assert [(fit["from"], fit.get("updates")) for fit in result["branches"]] == [
            (0, None),
            (9, 12),
            (9, 24),
        ]
        assert result["left"] == []


def test_sides_are_compared_on_two_processes(processes: Any):
    for result in processes:  # whose values are equal, as the first test asserts
        assert result["compared"] == result["compared again"]
        # Two trials and two seeds on each side; the second comparison trains nothing.
        assert [updates for _, updates, _ in result["seeds"]] == [24] * 8
        assert len({weights for _, _, weights in result["seeds"]}) == 8
        assert len({loss for losses in result["losses"] for loss in losses}) == 4


SPAWNS = """
import sys
from lightning_bigopt.tuning import Choice, study
from tests.tuning.study_helpers import Network, make_data, make_trainer

if __name__ == "__main__":
    make = lambda: make_trainer(devices=2, strategy="ddp_spawn")
    try:
        study(make, Network, make_data=make_data, space={"lr": Choice([0.05])}, trials=1)
    except ValueError as error:
        print(error)
"""


def test_strategy_that_spawns_each_fit_raises_with_the_way_out(tmp_path: Path):
    (tmp_path / "script.py").write_text(SPAWNS)
    run = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "strategy must start every process with this script, got DDPStrategy" in run.stdout
    assert "write strategy='ddp' in a script, use torchrun, or devices=1" in run.stdout
