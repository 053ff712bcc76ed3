"""``bigopt tune``: the best config trains to the same bits, both packages, spaces and errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml

from lightning_bigopt import WarmupCosine, WarmupStableDecay
from lightning_bigopt.cli import __main__ as cli
from lightning_bigopt.cli.tune import read_space
from lightning_bigopt.examples.comparison import read_scalars
from lightning_bigopt.tuning import Choice, Integer, Log, Uniform
from tests.cli.small_gpt import DATA, MODEL, TRAINER

ROOT = Path(__file__).parents[2]

CONFIG: dict[str, Any] = {
    "seed_everything": 3,
    "model": MODEL,
    "data": DATA,
    "trainer": {
        **TRAINER,
        "val_check_interval": 4,
        "log_every_n_steps": 1,
        "logger": {
            "class_path": "TensorBoardLogger",
            "init_args": {"save_dir": "runs", "name": "gpt", "default_hp_metric": False},
        },
        "callbacks": [
            {
                "class_path": "LearningRateScheduler",
                "init_args": {
                    "schedule": {
                        "class_path": "WarmupStableDecay",
                        "init_args": {"warmup": 2, "decay": "20%"},
                    }
                },
            },
            {"class_path": "GradientClipping", "init_args": {"rule": "ZClip"}},
            {"class_path": "StepGuard"},
        ],
    },
}
SPACE = """
lr: Log(3e-4, 3e-2)
weight_decay: Uniform(0.0, 0.3)
schedule.decay: Choice(["10%", "40%"])
clip.z_threshold: {class_path: lightning_bigopt.tuning.Uniform, init_args: {low: 1.5, high: 4.0}}
"""


@pytest.fixture(autouse=True)
def _in_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def write(config: dict[str, Any] = CONFIG, space: str = SPACE) -> list[str]:
    Path("config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    Path("space.yaml").write_text(space)
    return ["tune", "--config", "config.yaml", "--space", "space.yaml"]


def weights(version: int) -> dict[str, torch.Tensor]:
    (path,) = Path(f"runs/gpt/version_{version}/checkpoints").glob("*.ckpt")
    found: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return found


def table(text: str) -> dict[int, list[str]]:
    """Returns the printed trials by number."""
    rows = [
        line.split() for line in text.splitlines() if re.match(r" +\d+ +(complete|pruned)", line)
    ]
    return {int(row[0]): row for row in rows}


@pytest.mark.slow
def test_best_config_trains_to_the_same_bits(capsys: pytest.CaptureFixture[str]):
    command = [*write(), "--trials", "3", "--storage", "study.db", "--pruner", "none"]
    assert cli.main([*command, "--report", "out/report.html", "--picture", "study.png"]) == 0
    printed = capsys.readouterr().out
    (stored,) = optuna.get_all_study_summaries("sqlite:///study.db")
    assert stored.best_trial is not None
    best = stored.best_trial
    assert list(table(printed)) == [0, 1, 2]
    assert f"in trial {best.number}: lr=" in printed
    config = yaml.safe_load(Path("best.yaml").read_text())
    init_args = config["model"]["init_args"]
    assert init_args["lr"] == best.params["lr"]
    assert init_args["weight_decay"] == best.params["weight_decay"]
    schedule, clip = (c["init_args"] for c in config["trainer"]["callbacks"][:2])
    assert schedule["schedule"]["init_args"]["decay"] == best.params["schedule.decay"]
    assert schedule["schedule"]["init_args"]["warmup"] == 2
    assert clip["rule"]["init_args"]["z_threshold"] == best.params["clip.z_threshold"]
    assert "<svg" in Path("out/report.html").read_text()
    assert Path("study.png").read_bytes()[:4] == b"\x89PNG"

    assert cli.main(["fit", "--config", "best.yaml"]) == 0
    trial, again = weights(best.number), weights(3)
    assert all(torch.equal(trial[name], again[name]) for name in trial)
    losses = [read_scalars(Path(f"runs/gpt/version_{n}"))["val_loss"] for n in (best.number, 3)]
    assert losses[0] == losses[1]
    assert list(losses[0].values())[-1] == pytest.approx(
        best.value, rel=1e-7
    )  # float32 in the file
    # The same command goes on: there is nothing left to do.
    assert cli.main(command) == 0
    assert table(capsys.readouterr().out) == table(printed)


@pytest.mark.slow
def test_config_of_pytorch_lightning_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "theirs.py").write_text(
        "import torch\nimport pytorch_lightning as pl\n\n\n"
        "class Model(pl.LightningModule):\n"
        "    def __init__(self, lr: float = 0.1) -> None:\n"
        "        super().__init__()\n"
        "        self.layer, self.lr = torch.nn.Linear(2, 1), lr\n\n"
        "    def training_step(self, batch):\n"
        "        return self.layer(batch).square().mean()\n\n"
        "    def validation_step(self, batch):\n"
        "        self.log('val_loss', self.layer(batch).square().mean())\n\n"
        "    def configure_optimizers(self):\n"
        "        return torch.optim.SGD(self.parameters(), lr=self.lr)\n\n"
        "    def train_dataloader(self):\n"
        "        return torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=2)\n\n"
        "    val_dataloader = train_dataloader\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    trainer = {name: CONFIG["trainer"][name] for name in ("accelerator", "devices", "max_steps")}
    trainer |= {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [{"class_path": "LearningRateScheduler", "init_args": {"schedule": "Cosine"}}],
    }
    config = {"model": {"class_path": "theirs.Model"}, "trainer": trainer}
    command = write(config, "lr: Log(0.01, 0.5)\nschedule.end: Uniform(0, 0.2)\n")
    assert cli.main([*command, "--trials", "2"]) == 0
    best = yaml.safe_load(Path("best.yaml").read_text())
    assert 0.01 <= best["model"]["init_args"]["lr"] <= 0.5
    assert best["seed_everything"] == 0
    assert cli.main(["fit", "--config", "best.yaml"]) == 0


@pytest.mark.slow
def test_budgets_share_a_trunk(capsys: pytest.CaptureFixture[str]):
    config = {**CONFIG, "trainer": {**CONFIG["trainer"], "max_steps": 20}}
    command = write(config, "lr: Log(3e-4, 3e-2)")
    assert cli.main([*command, "--trials", "1", "--budgets", "50%,20"]) == 0
    # The trunk of 16 updates, and cooldowns of 2 and 4; separate runs train 10 and 20.
    printed = capsys.readouterr().out
    assert "cost: 22 updates" in printed
    assert "saved 8 of the 30 updates" in printed


def test_example_space_fits_the_example_config():
    from lightning_bigopt.cli.config_trainings import ConfigTrainings

    space = read_space(ROOT / "examples" / "space.yaml")
    ConfigTrainings(ROOT / "examples" / "gpt.yaml", seed=0).prepare(space)
    assert space["lr"] == Log(3e-4, 3e-2)
    assert space["schedule.decay"] == Choice(["10%", "20%", "40%"])


def test_space_is_read_in_both_forms(tmp_path: Path):
    (tmp_path / "space.yaml").write_text(
        "a: Log(1e-4, high=0.1)\n"
        "b: {class_path: Integer, init_args: {low: 1, high: 64, log: true}}\n"
        "c: Uniform(-1, 1)\n"
        "d: Choice([[0.9, 0.95], [0.9, 0.99]])\n"
    )
    assert read_space(tmp_path / "space.yaml") == {
        "a": Log(1e-4, 0.1),
        "b": Integer(1, 64, log=True),
        "c": Uniform(-1, 1),
        "d": Choice([[0.9, 0.95], [0.9, 0.99]]),
    }


def test_numbers_without_a_point_are_numbers(tmp_path: Path):
    (tmp_path / "space.yaml").write_text(
        "a: {class_path: Log, init_args: {low: 1e-4, high: 2E+1}}\n"
        "b: {class_path: Choice, init_args: {options: [1e-3, 1e3, e-3, 1e-3x, -.5e1, '1e-3']}}\n"
    )
    assert read_space(tmp_path / "space.yaml") == {
        "a": Log(1e-4, 20.0),
        "b": Choice([0.001, 1000.0, "e-3", "1e-3x", -5.0, "1e-3"]),
    }


def test_schedules_are_options_of_a_choice():
    from lightning_bigopt.cli.config_trainings import ConfigTrainings

    write(
        space="LearningRateScheduler.schedule:\n"
        "  class_path: Choice\n"
        "  init_args:\n"
        "    options:\n"
        "      - {class_path: WarmupCosine, init_args: {warmup: 2}}\n"
        "      - {class_path: WarmupStableDecay, init_args: {warmup: 1, decay: 30%}}\n"
    )
    space = read_space("space.yaml")
    trainings = ConfigTrainings("config.yaml", seed=0)
    trainings.prepare(space)
    ((path, choice),) = space.items()
    wanted = [WarmupCosine(warmup=2), WarmupStableDecay(warmup=1, decay="30%")]
    for label, schedule in zip(choice.distribution().choices, wanted, strict=True):
        built = trainings.build({path: choice.decode(label)})
        assert built.trainer.callbacks[0].schedule == schedule


@pytest.mark.slow
def test_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch):
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_bigopt.examples.gpt.BytesGPT.training_step", interrupt)
    assert cli.main([*write(), "--storage", "study.db"]) == 130
    trials = optuna.load_study(study_name="study", storage="sqlite:///study.db").trials
    assert [trial.state.name for trial in trials] == ["FAIL", "WAITING"]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("", "space must be ranges by path, got None"),
        ("lr: [0.1, 0.2]", r"got \[0.1, 0.2\] for 'lr'; write lr: Choice\(\[0.1, 0.2\]\)"),
        ("lr: 1e-3", r"got 0.001 for 'lr'; write lr: Log"),
        ("lr: [1e-3, 1e-2]", r"write lr: Choice\(\[0.001, 0.01\]\)"),
        ("lr: 0.1", r"got 0.1 for 'lr'; write lr: Log\(1e-4, 1e-1\)"),
        ("lr: Lg(1, 2)", "must be made of ranges and literals"),
        ("lr: Lgo", "space must be Log, Uniform, Integer or Choice, got 'Lgo'; did you mean Log"),
        ("lr: __import__('os')", "must be made of ranges and literals"),
        ("lr: Log(1)", r"Log must be written as Log\(low, high\), got other arguments"),
        ("lr: Log(0, 1)", "low must be positive"),
        ("lr: Choice(16, 32)", r"write them as in Choice\(\[16, 32\]\)"),
        ("lr: {class_path: Log, init_args: {lo: 1}}", "got lo=1; did you mean low"),
        ("a: [", "space must be a YAML file"),
    ],
)
def test_invalid_space_raises(space: str, message: str):
    write(space=space)
    with pytest.raises(ValueError, match=message):
        read_space("space.yaml")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("schedule.deacy: Uniform(0, 1)", "did you mean 'schedule.decay'"),
        ("length: Integer(4, 8)", "write one of 'model.length', 'data.length'"),
        ("guard.roll_back.lr_factor: Uniform(0, 1)", "paths of fields that exist"),
    ],
)
def test_unknown_path_is_an_error_of_the_command(
    space: str, message: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(write(space=space)) == 1
    error = capsys.readouterr().err
    assert "bigopt: error: space must contain" in error
    assert message in error


@pytest.mark.parametrize("option", ["--config", "--space"])
def test_missing_file_is_an_error_of_the_command(option: str, capsys: pytest.CaptureFixture[str]):
    command = write()
    command[command.index(option) + 1] = "missing.yaml"
    assert cli.main(command) == 1
    assert f"{option[2:]} must be a file, got 'missing.yaml'" in capsys.readouterr().err
