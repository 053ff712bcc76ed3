"""LightningCLI trains from a config file, and trains the same from the config that it saved."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader

from tests.helpers import Regression

CONFIG = """
seed_everything: 3
model:
  lr: 0.1
trainer:
  accelerator: cpu
  max_steps: 6
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  default_root_dir: {root}
  callbacks:
    - class_path: lightning_bigopt.LearningRateScheduler
      init_args:
        schedule:
          class_path: lightning_bigopt.WarmupStableDecay
          init_args:
            warmup: 2
            decay: 50%
            cooldown: linear
    - class_path: lightning_bigopt.GradientClipping
      init_args:
        rule:
          class_path: lightning_bigopt.NormClip
          init_args:
            max_norm: 0.5
        scope: all
    - class_path: lightning_bigopt.GradientCompression
      init_args:
        compressor:
          class_path: lightning_bigopt.TopK
          init_args:
            keep: 0.3
            start: 1 steps
    - class_path: lightning_bigopt.BatchSizeScheduler
      init_args:
        policy:
          class_path: lightning_bigopt.BatchSizeSteps
          init_args:
            sizes:
              0%: 2
              2 steps: 4
    - class_path: lightning_bigopt.ModelAveraging
      init_args:
        averages:
          ema:
            class_path: lightning_bigopt.EMA
            init_args:
              half_life: 20%
          merge:
            class_path: lightning_bigopt.Merge
            init_args:
              over: 3
              emulate: 1-sqrt
        use: merge
        dtype: float64
    - class_path: lightning_bigopt.OptimizationMonitor
      init_args:
        every: 2
"""


class Model(L.LightningModule):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Linear(4, 3)
        self.seen: list[tuple[float, int]] = []

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.seen.append(
            (float(optimizer.param_groups[0]["lr"]), int(self.trainer.accumulate_grad_batches))
        )


class DataModule(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(Regression(40), batch_size=2)


def train(config: Path, kind: type[Model] = Model) -> Any:
    cli = LightningCLI(
        kind,
        DataModule,
        args=["fit", "--config", str(config)],
        save_config_kwargs={"overwrite": True},
    )
    return cli.model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from LightningCLI
def test_saved_config_trains_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    config = tmp_path / "written.yaml"
    config.write_text(CONFIG.format(root=tmp_path))
    first = train(config)
    assert first.seen == [(0.0, 1), (0.05, 1)] + [
        (pytest.approx(lr), 2) for lr in (0.1, 0.1, 0.1 * 2 / 3, 0.1 / 3)
    ]
    saved = tmp_path / "config.yaml"
    assert "BatchSizeSteps" in saved.read_text()
    assert "scope: all" in saved.read_text()
    again = train(saved)
    assert again.seen == first.seen
    assert torch.equal(again.net.weight, first.net.weight)


COMBINED = """
seed_everything: 3
model:
  optimizer:
    class_path: lightning_bigopt.CombinedOptimizer
    init_args:
      optimizers:
        "hidden.* if ndim == 2":
          class_path: torch.optim.Muon
          init_args:
            lr: 0.02
        "*":
          class_path: torch.optim.AdamW
          init_args:
            lr: 0.1
            betas: [0.9, 0.95]
      groups:
        - pattern: ["net.weight", "net.none"]
          name: head
          lr_factor: 0.5
          weight_decay: 0.3
      no_decay: "* if ndim <= 1"
trainer:
  accelerator: cpu
  max_steps: 4
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  default_root_dir: {root}
  callbacks:
    - class_path: lightning_bigopt.LearningRateScheduler
      init_args:
        schedule:
          class_path: lightning_bigopt.Constant
        groups:
          AdamW.head:
            class_path: lightning_bigopt.Linear
        optimizers:
          Muon:
            class_path: lightning_bigopt.Linear
            init_args:
              end: 0.5
"""


class ModelOfParts(Model):
    def __init__(self, optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 4)
        self.optimizer = optimizer
        self.groups: list[dict[str, float]] = []

    def configure_optimizers(self) -> Any:
        return self.optimizer(self)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        groups = self.trainer.optimizers[0].param_groups
        self.groups.append({group["name"]: group["lr"] for group in groups})
        return nn.functional.mse_loss(self.net(self.hidden(batch[0])), batch[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from LightningCLI
def test_parts_and_groups_by_pattern_train_from_the_saved_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    config = tmp_path / "written.yaml"
    text = COMBINED.format(root=tmp_path).replace(', "net.none"', "")
    config.write_text(text)
    first = train(config, ModelOfParts)
    (optimizer,) = first.trainer.optimizers
    assert {g["name"]: (g["weight_decay"], g["param_names"]) for g in optimizer.param_groups} == {
        "Muon": (0.1, ["hidden.weight"]),
        "AdamW.no_decay": (0.0, ["net.bias", "hidden.bias"]),
        "AdamW.head": (0.3, ["net.weight"]),
    }
    assert optimizer.parts["AdamW"].param_groups[0]["betas"] == (0.9, 0.95)
    for update, rates in enumerate(first.groups):
        assert rates == {
            "Muon": pytest.approx(0.02 * (1 - 0.5 * update / 4)),
            "AdamW.no_decay": 0.1,
            "AdamW.head": pytest.approx(0.05 * (1 - update / 4)),
        }
    saved = tmp_path / "config.yaml"
    assert "CombinedOptimizer" in saved.read_text()
    again = train(saved, ModelOfParts)
    for mine, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, other)
    config.write_text(COMBINED.format(root=tmp_path))
    with pytest.raises(ValueError, match=r"every pattern of groups must match a .*'net.none'"):
        train(config, ModelOfParts)


MONITORED = """
seed_everything: 3
trainer:
  accelerator: cpu
  max_steps: 4
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args:
      save_dir: {root}
  callbacks:
    - class_path: lightning_bigopt.OptimizationMonitor
      init_args:
        every: 2
        activations: {activations}
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from LightningCLI
@pytest.mark.parametrize(
    ("activations", "label"), [("blocks", "net"), ('{output: "ne*"}', "output")]
)
def test_activations_are_logged_from_the_saved_config(
    activations: str, label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    config = tmp_path / "written.yaml"
    config.write_text(MONITORED.format(root=tmp_path, activations=activations))
    folders = []
    for _ in range(2):
        folders.append(Path(train(config).trainer.log_dir))
        config = folders[0] / "config.yaml"
    files = [(each / "metrics.csv").read_text().splitlines() for each in folders]
    rows = [list(csv.DictReader(lines)) for lines in files]
    tags = [f"activations/{name}/{label}" for name in ("rms", "max", "zeros", "grad_rms")]
    first, second = ([[row[tag] for tag in tags] for row in each] for each in rows)
    assert first == second
    assert len(first) == 2
    assert all(float(value) > 0 for row in first for value in (row[0], row[1], row[3]))
