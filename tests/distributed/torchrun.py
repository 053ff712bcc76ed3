"""Runs a module of scenarios on two processes with torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def results_of(scenarios: str, out: Path, *, timeout: int = 500) -> list[dict[str, Any]]:
    """Returns what each of two processes has written to ``rank<r>.json`` in a folder.

    Args:
        scenarios: Module in ``tests.distributed``, run with the folder as its argument.
        out: The folder.
        timeout: Seconds after which the processes are stopped, and the test fails.
    """
    start = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command = [sys.executable, "-m", *start, f"tests.distributed.{scenarios}", str(out)]
    run = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if run.returncode:
        pytest.fail(f"a process died:\n{run.stdout[-6000:]}\n{run.stderr[-6000:]}")
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]
