"""OptimizationMonitor on shards: values of full tensors, written by one process."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp1"])
def test_norms_are_those_of_full_parameters_and_one_file_is_written(
    strategy: str, two_processes: Any
) -> None:
    first, second = two_processes("monitored")
    assert second["ddp"]["curves"] == second[strategy]["curves"] == {}
    # One file of the logger, and one in event_folder.
    assert first["ddp"]["files"] == first[strategy]["files"] == 2
    assert len(first[strategy]["beside"]) > 20
    assert first[strategy]["beside"] == first[strategy]["curves"]
    assert first["ddp"]["reported"]  # written by one process
    assert first[strategy]["reported"]
    whole, sharded = first["ddp"]["curves"], first[strategy]["curves"]
    values = ("grad_norm", "weight_norm", "update_ratio", "zeros")
    names = [
        f"layers/{value}/net.{layer}.{kind}"
        for value, layer, kind in itertools.product(values, (0, 2), ("weight", "bias"))
    ]
    for tag in [*names, "grad_norm/total", "clip/coefficient", "clip/fraction"]:
        assert len(whole[tag]) == 8, tag
        for (step, truth), (other, found) in zip(whole[tag], sharded[tag], strict=True):
            assert step == other
            assert found == pytest.approx(truth, rel=1e-4, abs=1e-12), tag


def test_restarted_run_is_logged_once(two_processes: Any) -> None:
    assert two_processes("restarted") == [list(range(5)), None]


def test_folder_that_one_process_cannot_write_to_raises_on_both(two_processes: Any) -> None:
    first, second = two_processes("output_folders")
    other = "must be writable on every process, got an error on another process than process"
    batches, report = "batches of process 1", "report of process 0"
    assert first[batches] == f"forensics {other} 0; read its message"
    assert second[batches].startswith("forensics must be a folder that can be written to, got '")
    assert first[report].startswith("report must be a file in a folder that can be written to, ")
    assert second[report] == f"report {other} 1; read its message"


def test_event_folder_that_process_0_cannot_write_to_raises_on_both(two_processes: Any) -> None:
    first, second = (result["events of process 0"] for result in two_processes("output_folders"))
    assert first.startswith("event_folder must be a folder that can be written to, got '")
    assert second.startswith("event_folder must be writable on every process, got an error on")


def test_folder_that_breaks_on_one_process_gives_one_warning(two_processes: Any) -> None:
    first, second = (result["later"] for result in two_processes("output_folders"))
    assert first["weights"] == second["weights"]
    assert (first["files"], first["warnings"]) == ([True, True], 0)
    assert (second["files"], second["warnings"]) == ([False, False], 1)
