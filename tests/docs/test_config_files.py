"""The LightningCLI project of the recipe trains, and trains the same from its saved config."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recipes" / "config_files.md").read_text(encoding="utf-8")
# Values that do not depend on the time.
TAGS = ("step", "optim/lr", "grad_norm/total", "batch/global_size", "train_loss")


def block(language: str, containing: str) -> str:
    """Returns the only block of a language that contains a text."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (code,) = (code for code in found if containing in code)
    return code


def logged(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [{tag: row[tag] for tag in TAGS} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_saved_config_repeats_the_run(tmp_path: Path) -> None:
    (tmp_path / "project.py").write_text(block("python", "class Regression"))
    (tmp_path / "main.py").write_text(block("python", "LightningCLI(Regression, Sums)"))
    (tmp_path / "config.yaml").write_text(block("yaml", "model:\n  lr:"))
    commands = block("console", "version_0/config.yaml").splitlines()
    assert len(commands) == 2
    for command in commands:
        _, *arguments = command.split()
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    first, again = (logged(tmp_path / "runs" / "regression" / f"version_{n}") for n in (0, 1))
    assert first == again
    rates = [float(row["optim/lr"]) for row in first if row["optim/lr"]]
    # Updates 4, 9, 14, 19 of 20: the peak, and from update 10 on the batch is twice as large. The
    # last one is in the middle of a 1-sqrt cooldown over updates 16 to 20.
    scaled = 0.01 * 2**0.5
    assert rates == pytest.approx([0.01, 0.01, scaled, scaled * (1 - 0.75**0.5)])
