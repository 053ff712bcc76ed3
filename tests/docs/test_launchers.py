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
        "CUDA_VISIBLE_DEVICES": "",  # the script for Ray takes all devices
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


# Stand-ins for Ray, by file: one process, without the strategy of Ray. ``make test-ray`` runs the
# script with Ray.
RAY = {
    "ray/__init__.py": "",
    "ray/train/__init__.py": """
class ScalingConfig:
    def __init__(self, *, num_workers): ...

class FailureConfig:
    def __init__(self, *, max_failures): ...

class RunConfig:
    def __init__(self, *, storage_path, failure_config): ...

def get_checkpoint():
    return None
""",
    "ray/train/torch.py": """
class TorchTrainer:
    def __init__(self, train, *, train_loop_config, scaling_config, run_config):
        self.fit = lambda: train(train_loop_config)
""",
    "ray/train/lightning.py": """
from lightning.pytorch import Callback as RayTrainReportCallback
from lightning.pytorch.plugins.environments import LightningEnvironment as RayLightningEnvironment

def RayDDPStrategy():
    return "auto"

def prepare_trainer(trainer):
    return trainer
""",
}


def write_train(folder: Path) -> None:
    """Writes the script of the page, ``train.py``."""
    (script,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (folder / "train.py").write_text(script)


def assert_logs_the_values_of_the_page(folder: Path) -> None:
    curves = read_run(folder / "runs").curves
    shown = [
        f"| {step} | {lr:.4g} | {norm:.4g} | {size:g} |"
        for (step, lr), (_, norm), (_, size) in zip(
            curves["optim/lr"], curves["grad_norm/total"], curves["batch/global_size"], strict=True
        )
    ]
    assert len(shown) == 2
    assert "\n".join(shown) in PAGE


def test_the_page_lists_four_tested_commands() -> None:
    assert len(COMMANDS) == 4
    assert sum("--devices 2" in command for command in COMMANDS) == 3


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("command", COMMANDS)
def test_command_logs_the_values_of_the_page(tmp_path: Path, command: str) -> None:
    write_train(tmp_path)
    launch(command, tmp_path)
    assert_logs_the_values_of_the_page(tmp_path)


@pytest.mark.slow
def test_ray_script_is_complete_and_trains_with_stand_ins_for_ray(tmp_path: Path) -> None:
    write_train(tmp_path)
    (script,) = re.findall(r"^```py\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "train_ray.py").write_text(script)
    for name, code in RAY.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    launch("python train_ray.py", tmp_path)
    assert_logs_the_values_of_the_page(tmp_path)
