"""The demo: its table, its options and the command."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from lightning_bigopt.examples.comparison import Run, markdown_table, read_scalars
from lightning_bigopt.examples.demo import Demo

PNG = b"\x89PNG\r\n\x1a\n"


def run(*, losses: dict[int, float], norms: dict[int, float], title: str = "a") -> Run:
    return Run(
        title=title,
        seconds=2.0,
        scalars={
            "val_loss": losses,
            "optim/lr/decay": {0: 0.1, 1: 0.0042426},
            "optim/lr/no_decay": {0: 0.05},
            "grad_norm/total": norms,
            "progress/samples": {step: 32.0 * (step + 1) for step in norms},
        },
    )


def test_table_has_a_column_for_each_run_and_is_aligned():
    first = run(losses={3: 1.5}, norms={0: 1.0, 1: math.inf, 2: math.nan})
    second = run(losses={3: math.nan}, norms={0: 1.0}, title="a longer title")
    lines = markdown_table([first, second]).split("\n")
    assert len({len(line) for line in lines}) == 1
    cells = {line.split("|")[1].strip(): line.split("|")[2:4] for line in lines}
    assert [cell.strip() for cell in cells["validation loss (nats/byte)"]] == ["1.500", "nan"]
    assert [cell.strip() for cell in cells["peak learning rate"]] == ["0.1", "0.1"]
    assert [cell.strip() for cell in cells["optimizer updates"]] == ["3", "1"]
    assert [cell.strip() for cell in cells["samples"]] == ["96", "32"]
    assert [cell.strip() for cell in cells["non-finite steps"]] == ["2", "0"]


@pytest.mark.parametrize("max_steps", [1, 2, 3, 7, 400])
def test_plain_runs_train_on_as_many_samples(max_steps: int):
    sizes = [32 if 2 * update < max_steps else 64 for update in range(max_steps)]
    demo = Demo(max_steps=max_steps)
    assert demo.samples == sum(sizes) == 32 * demo.bare_steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "max_steps must be positive, got 0"),
        ({"devices": 3}, "devices must divide 32, got 3"),
        ({"devices": 0}, "devices must divide 32, got 0"),
    ],
)
def test_invalid_options_raise_with_their_names(options: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        Demo(**options)


@pytest.mark.slow
@pytest.mark.distributed
def test_command_trains_on_two_processes_and_writes_logs_and_picture(tmp_path: Path):
    bigopt = Path(sysconfig.get_path("scripts"), "bigopt")
    options = ["--max-steps", "6", "--devices", "2", "--strategy", "ddp", "--logdir", "logs"]
    result = subprocess.run(
        [sys.executable, bigopt, "demo", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    assert result.stdout.count("| validation loss") == 1, "only one process prints"
    updates = re.search(r"\| optimizer updates \|(.*)\|", re.sub(" +", " ", result.stdout))
    assert updates is not None
    assert updates[1].replace(" ", "") == "6|9|9|9"
    assert result.stdout.startswith("Trains a GPT of 0.4M parameters 4 times on 288 samples")
    assert re.sub(" +", "", updates.string).count("|0.00424|0.00") == 1  # lr_scaling="sqrt"
    assert "tensorboard --logdir logs" in result.stdout
    assert (tmp_path / "logs" / "demo.png").read_bytes().startswith(PNG)
    scalars = read_scalars(tmp_path / "logs" / "lightning_bigopt-lr-0.003")
    assert list(scalars["batch/global_size"].values()) == [32, 32, 32, 64, 64, 64]
    assert list(scalars["progress/samples"].values()) == [32, 64, 96, 160, 224, 288]
