"""Starts two processes once for all scenarios."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from notebooks.run import free_port
from tests.batch_helpers import train_recorder
from tests.distributed import batch_scenarios, scenarios

ROOT = Path(__file__).parents[2]


def launch(out: Path, names: list[str], *, processes: int = 2, timeout: float = 420) -> list[Any]:
    """Runs scenarios on several processes; returns one result per process."""
    port = free_port()
    workers = []
    for rank in range(processes):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-m", "tests.distributed.worker", str(out), *names]
        workers.append(
            subprocess.Popen(
                command,
                env=environment,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [worker.communicate(timeout=timeout)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    if any(worker.returncode for worker in workers):
        pytest.fail("a process died:\n" + "\n".join(output[-6000:] for output in outputs))
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns a function: scenario → its result on each of two processes."""
    names = [*scenarios.NAMES, "split_datasets"]
    results = launch(tmp_path_factory.mktemp("two"), names)
    return lambda name: [result[name] for result in results]


@pytest.fixture(scope="session")
def two_with_batches(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same for the scenarios of batch sizes, which take as long as all others."""
    out = tmp_path_factory.mktemp("batches")
    train_recorder(out / "alone")  # checkpoints of one process
    results = launch(out, batch_scenarios.NAMES)
    return lambda name: [result[name] for result in results]


@pytest.fixture(scope="session")
def four_with_batches(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same for one scenario on four processes."""
    results = launch(tmp_path_factory.mktemp("four"), ["exact_order"], processes=4)
    return lambda name: [result[name] for result in results]
