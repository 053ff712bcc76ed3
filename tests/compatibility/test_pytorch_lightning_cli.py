"""``bigopt`` and LightningCLI with modules of ``pytorch_lightning``."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

from lightning_bigopt.cli import __main__ as cli
from lightning_bigopt.cli.config import ConfiguredTraining
from lightning_bigopt.cli.package_of_config import model_path, training_class
from tests.compatibility.lightning_packages import NAMES, package

PROJECT = """
import {package} as pl
import torch
from torch.utils.data import DataLoader
from lightning_bigopt import Cosine, LearningRateScheduleMixin


class Module(pl.LightningModule):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.layer, self.lr = torch.nn.Linear(4, 1), lr

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        return DataLoader(torch.arange(32.0).view(8, 4), batch_size=2)


class Scheduled(LearningRateScheduleMixin, Module):
    def configure_learning_rate_schedule(self):
        return Cosine()
"""
CALLBACKS = [
    {
        "class_path": "lightning_bigopt.LearningRateScheduler",
        "init_args": {"schedule": {"class_path": "lightning_bigopt.Cosine"}},
    },
    {
        "class_path": "lightning_bigopt.GradientClipping",
        "init_args": {
            "rule": {"class_path": "lightning_bigopt.NormClip", "init_args": {"max_norm": 1.0}}
        },
    },
]
TRAINER = {
    "max_steps": 6,
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "callbacks": CALLBACKS,
}
PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(does not have many workers|is supported only for|exists and is not empty)"
)


def project(name: str) -> str:
    return name.replace(".", "_") + "_project"


@pytest.fixture(autouse=True)
def _in_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        package(name)  # so that the messages of other tests keep their logger
        (tmp_path / f"{project(name)}.py").write_text(PROJECT.format(package=name))
        config = {
            "seed_everything": 1,
            "trainer": TRAINER,
            "model": {"class_path": f"{project(name)}.Module", "init_args": {"lr": 0.01}},
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        monkeypatch.delitem(sys.modules, project(name), raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cli_of_the_page", raising=False)
    monkeypatch.chdir(tmp_path)


def weights(folder: str) -> dict[str, Any]:
    (path,) = Path(folder).glob("*.ckpt")
    found: dict[str, Any] = torch.load(path, weights_only=True)["state_dict"]
    return found


@pytest.mark.slow
def test_fit_and_plan_take_a_module_of_either_package(capsys: pytest.CaptureFixture[str]) -> None:
    trained, printed = [], []
    for name in NAMES:
        arguments = ["--config", f"{name}.yaml", "--trainer.default_root_dir", name]
        assert cli.main(["fit", *arguments]) == 0
        trained.append(weights(f"{name}/checkpoints"))
        capsys.readouterr()
        assert cli.main(["plan", f"{name}.yaml"]) == 0
        printed.append(capsys.readouterr().out)
        # The config that it saved trains again.
        assert cli.main(["fit", "--config", f"{name}/config.yaml"]) == 0
    first, second = trained
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert printed[0] == printed[1]
    assert "updates: 6" in printed[0]


def test_model_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--trainer.{key}={value}" for key, value in TRAINER.items() if key != "callbacks"]
    arguments = ["fit", "--model", f"{project(NAMES[1])}.Scheduled", "--model.lr=0.02", *options]
    assert cli.main(arguments) == 0


def test_errors_of_the_other_package_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", "--config", f"{NAMES[1]}.yaml", "--trainer.accumulate_grad_batches", "0"]
    assert cli.main(arguments) == 1
    assert capsys.readouterr().err.startswith("bigopt: error: ")


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ([], ""),
        (["--config"], ""),
        (["--config", "missing.yaml"], ""),
        (["--config", "pytorch_lightning.yaml"], "pytorch_lightning_project.Module"),
        (["--config=pytorch_lightning.yaml", "--model", "a.B"], "a.B"),
        (["--model.class_path=a.B", "--trainer.max_steps=3"], "a.B"),
        (["--config", "pytorch_lightning.yaml", "--config", "other.yaml"], "c.D"),
        (["--config", "no_mapping.yaml"], ""),
        (["--config", "broken.yaml"], ""),
    ],
)
def test_path_of_the_model(arguments: list[str], found: str) -> None:
    Path("other.yaml").write_text("model: c.D")
    Path("no_mapping.yaml").write_text("- model")
    Path("broken.yaml").write_text("model: {")
    assert model_path(arguments) == found


@pytest.mark.parametrize("model", ["", "BytesGPT", "missing.Module", "torch.nn.Linear", "math.pi"])
def test_other_models_are_left_to_lightning(model: str) -> None:
    assert training_class(model) is ConfiguredTraining


# ------------------------------------------------------------------- LightningCLI of the user


def run_cli(config: dict[str, Any], **options: Any) -> Any:
    from pytorch_lightning.cli import LightningCLI

    Path("own.yaml").write_text(yaml.safe_dump(config))
    with mock.patch.object(sys, "argv", ["cli.py", "fit", "--config", "own.yaml"]):
        return LightningCLI(**options)


def config_of(model: str, **options: Any) -> dict[str, Any]:
    return {
        "model": {"class_path": f"{project(NAMES[1])}.{model}"},
        "trainer": {**TRAINER, **options},
    }


def test_lightning_cli_rejects_callbacks_by_type_but_takes_the_mixins(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run_cli(config_of("Module"))
    assert "does not correspond to a subclass of Callback" in capsys.readouterr().err
    trained = run_cli(config_of("Scheduled", callbacks=None))
    assert trained.trainer.global_step == 6
    assert trained.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_the_script_of_the_page_takes_the_callbacks_in_a_config() -> None:
    (code,) = re.findall(r"```python\n(# cli.py.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    Path("cli_of_the_page.py").write_text(code)
    config = config_of("Module", default_root_dir="page")
    Path("own.yaml").write_text(yaml.safe_dump(config))
    with mock.patch.object(sys, "argv", ["cli.py", "fit", "--config", "own.yaml"]):
        importlib.import_module("cli_of_the_page")
    (path,) = Path("page/checkpoints").glob("*.ckpt")
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == 6
    assert {"LearningRateScheduler", "GradientClipping"} <= set(saved["callbacks"])
    (group,) = saved["optimizer_states"][0]["param_groups"]
    assert group["lr"] == pytest.approx(0.0, abs=1e-12)
