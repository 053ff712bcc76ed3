from __future__ import annotations

import json
import multiprocessing
import socket

import pytest
import torch.multiprocessing

from tests.gradients import distributed_checks


def launch(world, out):
    """Runs the checks of a group's size; for each process the checks' tracebacks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A server that has imported everything once forks the processes, with no thread of its own.
    multiprocessing.set_forkserver_preload([distributed_checks.__name__])
    torch.multiprocessing.start_processes(
        distributed_checks.run_all,
        (world, port, str(out)),
        nprocs=world,
        start_method="forkserver",
    )
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return launch(4, tmp_path_factory.mktemp("four"))


@pytest.mark.distributed
@pytest.mark.parametrize("check", [check.__name__ for check in distributed_checks.TWO])
def test_two_processes(two, check):
    for rank, results in enumerate(two):
        assert results.get(check, "was not reached") == "", f"process {rank}"


@pytest.mark.distributed
@pytest.mark.parametrize("check", [check.__name__ for check in distributed_checks.FOUR])
def test_four_processes(four, check):
    for rank, results in enumerate(four):
        assert results.get(check, "was not reached") == "", f"process {rank}"
