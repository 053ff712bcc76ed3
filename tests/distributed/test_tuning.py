"""Branches on two processes: equal decisions, and a run that they do not change."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.torchrun import results_of
from tests.distributed.tuning_scenarios import CASES

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Returns the results of the scenarios on each of two processes, which are started once."""
    return results_of("tuning_scenarios", tmp_path_factory.mktemp("tuning"))


@pytest.mark.parametrize("case", CASES)
def test_measured_sizes_train_as_sizes_written_in_advance(case: str, two: Any) -> None:
    first, second = (result["grown"][case] for result in two)
    assert first["measured"] == second["measured"]  # also the losses: they are averaged
    assert [entry[:2] for entry in first["measured"]] == [[192, 8], [384, 16]]
    assert first["updates"] == 24 + 12 + 12
    for found in (first, second):
        measured, written = found["runs"]
        assert measured == written
    assert first["runs"][0][0] == second["runs"][0][0]
    assert first["runs"][0][1] != second["runs"][0][1]  # the processes have other samples


@pytest.mark.parametrize("case", CASES)
def test_critical_batch_is_equal_on_both_processes_and_leaves_no_trace(case: str, two: Any) -> None:
    first, second = (result["critical"][case] for result in two)
    assert first["result"] == second["result"]
    losses, batch_size, window, updates = first["result"]
    assert (batch_size, window, updates) == (8, 96, 12 + 6 + 4)
    assert [len(values) for values in losses] == [5, 5, 5]
    assert losses[0] != losses[1]
    for found in (first, second):
        with_measurement, without = found["runs"]
        assert with_measurement == without
