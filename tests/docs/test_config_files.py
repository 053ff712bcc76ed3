"""The projects of the recipe, LightningCLI and Hydra, train as the page says."""

from __future__ import annotations

import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import instantiate
from lightning import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    GradientClipping,
    LearningRateScheduler,
    MultiStep,
    NonFinite,
    NormClip,
    NormSpike,
    OptimizationMonitor,
    Product,
    StepGuard,
    WarmupCosine,
    WarmupStableDecay,
)

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recipes" / "config_files.md").read_text(encoding="utf-8")
# Values that do not depend on the time.
TAGS = ("step", "optim/lr", "grad_norm/total", "batch/global_size", "train_loss")


def block(language: str, containing: str) -> str:
    """Returns the only block of a language that contains a text."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (code,) = (code for code in found if containing in code)
    return code


def run(command: str, folder: Path, **variables: str) -> None:
    _, *arguments = shlex.split(command)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


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
        run(command, tmp_path)
    first, again = (logged(tmp_path / "runs" / "regression" / f"version_{n}") for n in (0, 1))
    assert first == again
    rates = [float(row["optim/lr"]) for row in first if row["optim/lr"]]
    # Updates 4, 9, 14, 19 of 20: the peak, and from update 10 on the batch is twice as large. The
    # last one is in the middle of a 1-sqrt cooldown over updates 16 to 20.
    scaled = 0.01 * 2**0.5
    assert rates == pytest.approx([0.01, 0.01, scaled, scaled * (1 - 0.75**0.5)])


def write_hydra_project(folder: Path) -> None:
    files = re.findall(
        r"^`((?:configs|src)/[\w/.]+)`[^\n]*:\n\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL
    )
    assert len(files) == 13
    for name, content in (*files, ("src/project.py", block("python", "class Regression"))):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def train_without_hydra(
    folder: Path, *, rule: NormClip, max_steps: int = 20, decay: str = "20%"
) -> list[dict[str, str]]:
    """Trains with objects that Python code builds, and returns what is logged."""
    project: dict[str, Any] = {"__name__": "project"}
    exec(block("python", "class Regression"), project)
    seed_everything(0, workers=True)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        log_every_n_steps=5,
        enable_progress_bar=False,
        logger=CSVLogger(folder, name="", version="csv"),
        callbacks=[
            LearningRateScheduler(WarmupStableDecay(warmup="10%", decay=decay)),
            GradientClipping(rule),
            StepGuard([NonFinite(), NormSpike()]),
            BatchSizeScheduler(BatchSizeSteps({"0%": 8, "50%": 16}), lr_scaling="sqrt"),
            OptimizationMonitor(layers={"linear": "layer*"}),
        ],
    )
    trainer.fit(project["Regression"](lr=0.01), datamodule=project["Sums"]())
    return logged(folder / "csv")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec. is deprecated")
def test_hydra_project_trains_as_without_hydra(tmp_path: Path) -> None:
    write_hydra_project(tmp_path)
    run_changed, run_sweep = block("console", "src/train.py").splitlines()

    run(run_changed, tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    assert logged(folder / "csv") == train_without_hydra(
        tmp_path / "changed", rule=NormClip(max_norm=1.0), max_steps=12, decay="50%"
    )
    assert "guard/skipped" not in (folder / "csv" / "metrics.csv").read_text()

    run(run_sweep, tmp_path)
    (sweep,) = (tmp_path / "sweeps").iterdir()
    jobs = [logged(sweep / number / "csv") for number in ("0", "1")]
    assert jobs[0] != jobs[1]
    for max_norm, job in zip((0.05, 0.5), jobs, strict=True):
        rule = NormClip(max_norm=max_norm, norm_type=1)
        assert job == train_without_hydra(tmp_path / str(max_norm), rule=rule)


# Records the learning rates. The first start of the job gets the signal after update 8 and ends as
# if SLURM had killed it; the second one finds the file of scontrol.
SIGNAL = """
import os, signal
from pathlib import Path
import lightning as L

first = not Path("calls").exists()

class Signal(L.Callback):
    def on_train_batch_start(self, trainer, *_):
        if Path("calls").exists() and first:
            os._exit(0)
        with open("rates", "a") as file:
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            print(int(first), trainer.global_step, rate, file=file)
        if first and trainer.global_step == 8:
            os.kill(os.getpid(), signal.SIGUSR1)
"""


@pytest.mark.slow
def test_requeued_job_of_hydra_continues_in_its_folder(tmp_path: Path) -> None:
    write_hydra_project(tmp_path)
    (tmp_path / "src" / "signals.py").write_text(SIGNAL)
    (tmp_path / "configs" / "callbacks" / "signal.yaml").write_text(
        "defaults: [default, _self_]\nsignal:\n  _target_: signals.Signal\n"
    )
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "calls"}\n')
    scontrol.chmod(0o755)
    job = {"JOB_ID": "4711", "JOB_NAME": "train", "NTASKS": "1", "NODEID": "0", "LOCALID": "0"}
    environment = {f"SLURM_{name}": value for name, value in (job | {"PROCID": "0"}).items()}
    environment |= {"PATH": f"{scontrol.parent}:/usr/bin:/bin", "WANDB_MODE": "offline"}
    command = block("bash", "srun python").strip().removeprefix("srun ")
    command = command.replace("$SLURM_JOB_ID", "4711")
    for _ in range(2):
        run(f"{command} callbacks=signal", tmp_path, **environment)
    assert (tmp_path / "calls").read_text() == "requeue 4711\n"
    assert len(list((tmp_path / "runs" / "4711" / "wandb").glob("offline-run-*-4711"))) == 2
    lines = [line.split() for line in (tmp_path / "rates").read_text().splitlines()]
    first, second = ({step: rate for f, step, rate in lines if f == start} for start in "10")
    assert list(first) == [str(step) for step in range(9)]
    assert list(second) == [str(step) for step in range(9, 20)]
    factors = WarmupStableDecay(warmup="10%", decay="20%").values(20)
    scaled = [0.01 * factor * (1.0 if step < 10 else 2**0.5) for step, factor in enumerate(factors)]
    assert [float(rate) for rate in (first | second).values()] == pytest.approx(scaled)


def test_config_with_convert_all_builds_what_the_page_says() -> None:
    (message,) = re.findall(r"^```text\n(_convert_.*)\n```$", PAGE, re.MULTILINE)
    config = yaml.safe_load(block("yaml", "_convert_: all"))["product"]
    made = instantiate(config)
    assert made.schedule == Product([WarmupCosine(warmup="10%"), MultiStep({"50%": 0.5})])
    del config["_convert_"]
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}\n"):
        instantiate(config)
