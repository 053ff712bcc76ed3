"""``bigopt fit``: the example, options on the command line, and the saved config."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_bigopt.cli import __main__ as cli
from lightning_bigopt.examples.comparison import read_scalars

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "gpt.yaml"
SMALL = [
    *("--trainer.max_steps", "6", "--trainer.log_every_n_steps", "1"),
    *("--trainer.val_check_interval", "null", "--trainer.accelerator", "cpu"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--model.width", "16", "--model.layers", "1", "--model.heads", "2", "--model.length", "8"),
    *("--data.length", "8", "--data.validation_samples", "64"),
]


@pytest.fixture(autouse=True)
def _in_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def weights(version: int) -> dict[str, torch.Tensor]:
    (path,) = Path(f"runs/gpt/version_{version}/checkpoints").glob("*.ckpt")
    found: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return found


def config(version: int, name: str = "config.yaml") -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(Path(f"runs/gpt/version_{version}/{name}").read_text())
    return found


@pytest.mark.slow
def test_example_trains_and_its_saved_config_trains_to_the_same_weights():
    assert cli.main(["fit", "--config", str(EXAMPLE), *SMALL]) == 0
    # The warm-up is 5 % of 6 updates: 0.3. The cooldown begins at update 4.8, so at update 5 the
    # factor is 1 - √(0.2/1.2). The batch doubles at update 3, which multiplies by √2.
    used = read_scalars(Path("runs/gpt/version_0"))
    expected = [0.0, 1.0, 1.0, 2**0.5, 2**0.5, 2**0.5 * (1 - (0.2 / 1.2) ** 0.5)]
    assert list(used["optim/lr/decay"].values()) == pytest.approx([3e-3 * f for f in expected])
    assert list(used["batch/global_size"].values()) == [32, 32, 32, 64, 64, 64]
    assert used["grad_norm/total"].keys() == set(range(6))
    assert {"clip/coefficient", "guard/skipped"} <= set(used)

    saved = config(0)
    assert saved["trainer"]["max_steps"] == 6
    assert saved["seed_everything"] == 0
    named = [callback["class_path"] for callback in saved["trainer"]["callbacks"]]
    assert [name.rsplit(".", 1)[1] for name in named] == [
        "LearningRateScheduler",
        "GradientClipping",
        "StepGuard",
        "BatchSizeScheduler",
        "OptimizationMonitor",
    ]
    assert cli.main(["fit", "--config", "runs/gpt/version_0/config.yaml"]) == 0
    first, second = weights(0), weights(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert cli.main(["plan", "runs/gpt/version_1/config.yaml"]) == 0


@pytest.mark.slow
def test_combined_optimizer_trains_from_the_file_and_from_the_saved_config():
    assert cli.main(["fit", "--config", str(ROOT / "examples" / "gpt_muon.yaml"), *SMALL]) == 0
    used = read_scalars(Path("runs/gpt/version_0"))
    # The warm-up is 5 % of 6 updates: 0.3. The cooldown begins at update 4.8.
    factors = [0.0, 1.0, 1.0, 1.0, 1.0, 1 - (0.2 / 1.2) ** 0.5]
    for group in ("Muon", "AdamW", "AdamW.no_decay"):
        rates = list(used[f"optim/lr/{group}"].values())
        assert rates == pytest.approx([3e-3 * factor for factor in factors])
    halves = [0.5 * (1 + math.cos(math.pi * (t - 0.3) / 5.7)) for t in range(1, 6)]
    cosine = [0.0, *(0.1 + 0.9 * half for half in halves)]
    rates = list(used["optim/lr/AdamW.head"].values())
    assert rates == pytest.approx([1.5e-3 * factor for factor in cosine])

    (path,) = Path("runs/gpt/version_0/checkpoints").glob("*.ckpt")
    (saved,) = torch.load(path, weights_only=True)["optimizer_states"]
    groups = {group["name"]: group for group in saved["param_groups"]}
    assert groups["Muon"]["updates"] == 6
    assert groups["AdamW.head"]["weight_decay"] == 0.0
    assert "blocks.0.attention.expand.weight" in groups["AdamW"]["param_names"]
    assert config(0)["model"]["init_args"]["optimizer"]["class_path"].endswith("MuonAdamW")
    assert cli.main(["fit", "--config", "runs/gpt/version_0/config.yaml"]) == 0
    first, second = weights(0), weights(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert cli.main(["plan", "runs/gpt/version_1/config.yaml"]) == 0


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
@pytest.mark.slow
def test_resumed_run_saves_its_config_beside_the_first():
    arguments = ["fit", "--config", str(EXAMPLE), *SMALL, "--trainer.logger.version", "0"]
    arguments += ["--trainer.callbacks+", "ModelCheckpoint", "--trainer.callbacks.save_top_k", "-1"]
    arguments += ["--trainer.callbacks.every_n_train_steps", "2"]
    assert cli.main(arguments) == 0
    folder = Path("runs/gpt/version_0")
    rates = read_scalars(folder)["optim/lr/decay"]
    checkpoint = folder / "checkpoints" / "epoch=0-step=4.ckpt"
    assert cli.main([*arguments, "--ckpt_path", str(checkpoint)]) == 0
    assert config(0)["ckpt_path"] is None
    assert config(0, "config-1.yaml")["ckpt_path"] == str(checkpoint)
    assert config(0)["trainer"]["callbacks"][-1]["class_path"].endswith("ModelCheckpoint")
    resumed = read_scalars(folder)["optim/lr/decay"]
    assert {step: rate for step, rate in resumed.items() if step >= 4} == {4: rates[4], 5: rates[5]}


MODULE = """
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

class MyModel(BoringModel):
    def __init__(self, greeting: str = "hello") -> None:
        super().__init__()
        print(f"{greeting} from the folder")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
"""


@pytest.mark.slow
def test_installed_command_finds_a_model_in_the_current_folder(tmp_path: Path):
    (tmp_path / "mine.py").write_text(MODULE)
    script = Path(sysconfig.get_path("scripts"), "bigopt")
    options = ["--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu"]
    options += ["--trainer.callbacks+", "LearningRateScheduler"]
    options += ["--trainer.callbacks.schedule", "Cosine"]
    done = subprocess.run(
        [sys.executable, script, "fit", "--model", "mine.MyModel", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "hello from the folder" in done.stdout
