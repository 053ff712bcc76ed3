"""Rollbacks on two processes end as a run whose order never held the bad samples."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.rollback_scenarios import CASES
from tests.distributed.torchrun import results_of

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return results_of("rollback_scenarios", tmp_path_factory.mktemp("rollbacks"))


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
