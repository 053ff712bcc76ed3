"""Loss curves from logs: both formats, both callbacks, and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_bigopt import LearningRateScheduler, OptimizationMonitor, WarmupCosine
from lightning_bigopt.reporting import read_loss_curve, read_loss_curves

UPDATES = 24


class Model(LightningModule):
    """Logs a loss that says at which update it was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(2, 2), nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        self.log("loss", 100.0 - self.global_step)
        return self.head(self.layer(batch)).square().mean()

    def validation_step(self, batch: torch.Tensor) -> None:
        self.log("val_loss", 1000.0 - self.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [
            {"params": self.layer.parameters(), "name": "body", "lr": 0.01},
            {"params": self.head.parameters(), "name": "head", "lr": 0.02},
        ]
        return torch.optim.SGD(groups, lr=0.01)


def train(logger: Any, callback: Any) -> None:
    schedule = LearningRateScheduler(WarmupCosine(warmup="25%", end=0.1))
    trainer = Trainer(
        max_steps=UPDATES,
        callbacks=[schedule, callback],
        logger=logger,
        log_every_n_steps=2,
        val_check_interval=6,
        check_val_every_n_epoch=None,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(torch.ones(8, 2), batch_size=2)
    trainer.fit(Model(), data, DataLoader(torch.ones(2, 2)))


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
@pytest.mark.parametrize("monitor", [OptimizationMonitor, LearningRateMonitor])
def test_curves_of_both_formats_and_callbacks(tmp_path: Path, kind: Any, monitor: Any) -> None:
    train(kind(tmp_path), monitor())
    found = read_loss_curve(tmp_path)
    assert found.updates == (6, 12, 18, 24)
    assert found.losses == (994, 988, 982, 976)
    expected = WarmupCosine(warmup="25%", end=0.1).values(UPDATES, base=0.02)
    # Every second update is logged, and the corner of the warm-up lies between two of them.
    assert found.learning_rates[1:23:2] == pytest.approx(expected[1:23:2], rel=1e-6)
    assert found.learning_rates[:23] == pytest.approx(expected[:23], abs=4e-3)

    training = read_loss_curve(tmp_path, loss="loss")
    assert training.updates[:3] == (2, 4, 6)
    assert training.losses[:3] == (99, 97, 95)


def csv_run(folder: Path, name: str, text: str) -> Path:
    path = folder / name / "metrics.csv"
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    return path.parent


def test_all_runs_below_a_folder_in_order(tmp_path: Path) -> None:
    for name in ("b", "a/version_0"):
        csv_run(tmp_path, name, f"step,lr-SGD,val_loss\n0,0.1,2.0\n9,0.1,1.{len(name)}\n")
    assert [curve.name for curve in read_loss_curves(tmp_path)] == ["a/version_0", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step,val_loss\n0,2.0\n9,1.0\n", "has no learning rate among"),
        ("step,lr-SGD,val_los\n0,0.1,2.0\n9,0.1,1.0\n", "did you mean 'val_los'?"),
        (
            "step,lr-SGD,val_loss\n0,0.1,2.0\n9,0.1,nan\n",
            "losses of run must be a list of finite",
        ),
        (
            "step,lr-SGD,val_loss,progress/samples\n0,0.1,2.0,0\n64,0.1,1.0,64\n",
            r"x_axis='updates'",
        ),
    ],
)
def test_incomplete_logs_name_the_way_out(tmp_path: Path, text: str, message: str) -> None:
    csv_run(tmp_path, "run", text)
    with pytest.raises(ValueError, match=message):
        read_loss_curve(tmp_path / "run")


def test_a_folder_without_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pilots must be a folder with the logs of runs"):
        read_loss_curves(tmp_path)
    with pytest.raises(ValueError, match="pilots must be a folder"):
        read_loss_curves(tmp_path / "nowhere")


def test_other_fields_of_learning_rate_monitor_are_no_learning_rates(tmp_path: Path) -> None:
    text = "step,lr-Adam,lr-Adam-momentum,lr-Adam-weight_decay,val_loss\n"
    rows = "".join(f"{step},{1e-3 - step * 1e-5},0.9,0.1,2.0\n" for step in range(20))
    csv_run(tmp_path, "run", text + rows)
    assert read_loss_curve(tmp_path / "run").peak == pytest.approx(1e-3)


def rows(first: int, last: int, every: int, loss: float = 2.0) -> str:
    lines = [f"{step},0.1,{loss - step / 1000}" for step in range(first, last, every)]
    return "\n".join(["step,lr-SGD,val_loss", *lines])


def test_logs_that_are_no_runs_are_left_out_with_a_warning(tmp_path: Path) -> None:
    csv_run(tmp_path, "a", rows(0, 100, 2))
    csv_run(tmp_path, "b", rows(100, 200, 2))
    csv_run(tmp_path, "c", "step,val_loss\n0,2.0\n")
    csv_run(tmp_path, "d", rows(0, 100, 2))
    with pytest.warns(UserWarning, match="left out") as caught:
        found = read_loss_curves(tmp_path)
    assert [curve.name for curve in found] == ["a"]
    text = str(caught[0].message)
    assert "b begins at update 101 and continues another run" in text
    assert "c has no learning rate" in text
    assert "d has the losses of another run" in text
    with pytest.raises(ValueError, match="b, which begins at update 101"):
        read_loss_curve(tmp_path / "b")
    with pytest.raises(ValueError, match="run from its beginning, got b begins"):
        read_loss_curves(tmp_path / "b")


def test_sparse_learning_rates_give_a_warning_and_a_warmup(tmp_path: Path) -> None:
    csv_run(tmp_path, "run", rows(49, 500, 50))
    with pytest.warns(UserWarning, match="every 50 updates only, of 500"):
        found = read_loss_curve(tmp_path / "run")
    assert found.warmup == 50
    assert found.learning_rates[25] == pytest.approx(0.1 * 25 / 49)
