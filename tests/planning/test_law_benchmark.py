"""The part of ``benchmarks/loss_law.py`` that compares laws with grids of runs."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.laws.grid_data import generated_rows, read_rows
from benchmarks.laws.grid_gaps import interpolated_gap, nearest_gap, split_figures
from benchmarks.laws.grids import grids
from lightning_bigopt import HyperparameterLaw
from lightning_bigopt.planning.sweep_table import COLUMNS, Grid

ROOT = Path(__file__).parents[2]


def write(path: Path, rows: list[dict[str, float]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_gaps_of_a_grid_by_hand():
    grid = Grid(
        parameters=1.0,
        tokens=1.0,
        learning_rates=(1e-3, 1e-3, 4e-3, 4e-3),
        batches=(1e4, 4e4, 1e4, 4e4),
        losses=(2.0, 2.2, 2.4, 2.6),
    )
    law = HyperparameterLaw(
        name="mine",
        learning_rate=(1.8e-3, 0.0, 0.0),  # nearer to 1e-3 than to 4e-3, in logarithms
        batch_tokens=(2.5e4, 0.0, 0.0),  # nearer to 4e4
        parameters=(1.0, 1.0),
    )
    assert nearest_gap(law, grid) == pytest.approx(10.0)
    across = math.log(1.8) / math.log(4), math.log(2.5) / math.log(4)
    assert interpolated_gap(law, grid) == pytest.approx(50 * (0.4 * across[0] + 0.2 * across[1]))


def test_figures_of_splits():
    figures = split_figures([0.1, 0.2, 0.3, 0.1])
    assert figures == ["0.175 %", "0.150 %", "0.300 %", "0.300 %", "50%"]


def test_predictions_of_another_file(tmp_path, capsys):
    rows = generated_rows(0, (1e8, 2e8, 4e8))
    others = generated_rows(1, (1.6e9,))
    path = write(tmp_path / "grids.csv", rows)
    grids(path, write(tmp_path / "others.csv", others))
    printed = capsys.readouterr().out
    assert printed.count("1.6e+09 parameters") == 3
    last = printed.splitlines()[-1]
    assert last.startswith("mean gap ")
    assert float(last.split()[2]) < 0.15
    assert read_rows(path) == rows


def test_a_file_without_a_column_is_refused(tmp_path):
    path = tmp_path / "grids.csv"
    path.write_text("parameters,tokens\n1,2\n")
    with pytest.raises(SystemExit, match="must have the columns parameters, tokens, learning_rate"):
        read_rows(path)


@pytest.mark.slow
def test_the_script_runs_without_a_file():
    script = str(ROOT / "benchmarks" / "loss_law.py")
    done = subprocess.run(
        [sys.executable, script, "--quick"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1].startswith("mean gap 0.0")
