"""Rollbacks on two processes end as a run whose order never held the bad samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from notebooks.run import free_port
from tests.distributed.conftest import ROOT
from tests.distributed.rollback_scenarios import CASES

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    out = tmp_path_factory.mktemp("rollbacks")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-port", str(free_port()), "-m", "tests.distributed.rollback_scenarios"),
        str(out),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )
    assert not done.returncode, done.stdout[-3000:] + done.stderr[-6000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_both_processes_end_as_without_the_samples(results: list[Any], case: str) -> None:
    for result in (one[case] for one in results):
        (report,) = result["reports"]
        assert report["to"] == result["snapshot"]
        assert result["weights"] == result["clean"]
    assert results[0][case]["reports"] == results[1][case]["reports"]


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_of_both_processes_does_too(results: list[Any], case: str) -> None:
    """A sharded checkpoint does not hold snapshots in memory: the run cannot go back to them."""
    for result in (one[case] for one in results):
        if case == "fsdp2 memory":
            assert "must have a snapshot to roll back to" in result["error"]
            continue
        assert result["resumed reports"] == result["reports"]
        assert result["resumed"] == result["clean"]
