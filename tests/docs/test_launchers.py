"""The commands of the page on launchers train, and log the values that the page shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_bigopt.reporting.runs import read_run
from notebooks.run import free_port

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guides" / "launchers.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\| [^|]+ \| `([^`]+)` \| tested \|$", PAGE, re.MULTILINE)


def launch(command: str, folder: Path) -> None:
    """Runs a command of the page with this interpreter."""
    name, *arguments = command.split()
    program = {
        "python": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    }[name]
    if name == "torchrun":
        arguments = ["--master-port", str(free_port()), *arguments]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MASTER_PORT": str(free_port()),
    }
    done = subprocess.run(
        [*program, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr


def test_the_page_lists_four_tested_commands() -> None:
    assert len(COMMANDS) == 4
    assert sum("--devices 2" in command for command in COMMANDS) == 3


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("command", COMMANDS)
def test_command_logs_the_values_of_the_page(tmp_path: Path, command: str) -> None:
    (script,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "train.py").write_text(script)
    launch(command, tmp_path)
    curves = read_run(tmp_path / "runs").curves
    shown = [
        f"| {step} | {lr:.4g} | {norm:.4g} | {size:g} |"
        for (step, lr), (_, norm), (_, size) in zip(
            curves["optim/lr"], curves["grad_norm/total"], curves["batch/global_size"], strict=True
        )
    ]
    assert len(shown) == 2
    assert "\n".join(shown) in PAGE
