"""Three Lightning scripts that were not written for this package, with its callbacks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_bigopt import (
    BatchSizeScheduler,
    ConstantBatchSize,
    GradientClipping,
    GradientNoiseScale,
    LearningRateScheduler,
    Linear,
    NormClip,
    OptimizationMonitor,
    StepGuard,
    WarmupCosine,
    WarmupStableDecay,
    ZClip,
)
from lightning_bigopt.examples.comparison import read_scalars
from tests.users import digits, gan, regression

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
]


def quiet_options(folder: Path) -> dict[str, Any]:
    return {
        "logger": TensorBoardLogger(folder, name="", version=""),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


def series(folder: Path, tag: str) -> list[float]:
    return list(read_scalars(folder)[tag].values())


def test_gan_under_manual_optimization(tmp_path: Path) -> None:
    callbacks = [
        LearningRateScheduler(WarmupCosine(warmup="25%", end=0.0)),
        GradientClipping(NormClip(max_norm=0.05)),
        StepGuard(),
        OptimizationMonitor(),
    ]
    trainer = gan.main(callbacks=callbacks, **quiet_options(tmp_path))
    # 4 epochs of 8 batches: both optimizers follow one schedule from their own learning rates.
    scalars = read_scalars(tmp_path)
    expected = [t / 8 if t < 8 else (1 + math.cos(math.pi * (t - 8) / 24)) / 2 for t in range(32)]
    for name, base in (("Adam-0", 2e-3), ("Adam-1", 4e-3)):
        used = list(scalars[f"optim/lr/{name}"].values())
        assert used == pytest.approx([base * factor for factor in expected])
        norms = list(scalars[f"grad_norm/total/{name}"].values())
        assert len(norms) == 32
        assert min(norms) > 0
        coefficients = list(scalars[f"clip/coefficient/{name}"].values())
        limits = [min(1.0, 0.05 / (norm + 1e-6)) for norm in norms]
        assert coefficients == pytest.approx(limits, rel=1e-5)
    assert trainer.global_step == 64


def test_batch_size_scheduler_raises_for_the_gan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"automatic_optimization must be True .*; "):
        gan.main(callbacks=[BatchSizeScheduler(ConstantBatchSize(64))], **quiet_options(tmp_path))


def our_callbacks(**options: Any) -> list[L.Callback]:
    return [
        LearningRateScheduler(WarmupStableDecay(warmup="25%", decay="25%"), **options),
        GradientClipping(ZClip()),
        StepGuard(),
        BatchSizeScheduler(ConstantBatchSize(128)),
        GradientNoiseScale(),
        OptimizationMonitor(),
    ]


def test_classifier_raises_for_its_scheduler_and_for_gradient_clip_val(
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match=r"got StepLR; .*pass module_scheduler='replace'"):
        digits.main(our_callbacks(), **quiet_options(tmp_path))
    with pytest.raises(ValueError, match=r"gradient_clip_val must be None .*keep one of them"):
        digits.main(
            our_callbacks(module_scheduler="replace"),
            gradient_clip_val=0.5,
            **quiet_options(tmp_path),
        )


def test_classifier_without_conflicts_trains_and_resumes(tmp_path: Path) -> None:
    whole = digits.main(
        our_callbacks(module_scheduler="replace"), **quiet_options(tmp_path / "whole")
    )
    # 1258 images in batches of 64: 20 an epoch, 2 per update; 4 epochs are 40 updates.
    assert whole.global_step == 40
    used = series(tmp_path / "whole", "optim/lr")
    factors = [
        t / 10 if t < 10 else 1.0 if t < 30 else 1 - math.sqrt((t - 30) / 10) for t in range(40)
    ]
    assert used == pytest.approx([0.01 * factor for factor in factors])
    assert series(tmp_path / "whole", "batch/global_size")[:9] == [128.0] * 9
    assert len(series(tmp_path / "whole", "grad_norm/total")) == 40
    assert float(whole.callback_metrics["val_acc"]) > 0.8
    # The values that LearningRateMonitor logs.
    watched = series(tmp_path / "whole", "lr-AdamW")
    assert max(watched) == pytest.approx(0.01)

    path = next((tmp_path / "whole").rglob("epoch=1-*.ckpt"))
    resumed = digits.main(
        our_callbacks(module_scheduler="replace"), str(path), **quiet_options(tmp_path / "resumed")
    )
    assert resumed.global_step == 40
    again = read_scalars(tmp_path / "resumed")["optim/lr"]
    assert list(again.values())[-20:] == pytest.approx(used[20:])


CONFIG = """
seed_everything: 7
trainer:
  max_steps: 40
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
  logger:
    class_path: TensorBoardLogger
    init_args: {{save_dir: {folder}, name: '', version: ''}}
optimizer:
  class_path: torch.optim.AdamW
  init_args: {{lr: 0.02}}
"""


def fit(config: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Any:
    monkeypatch.setattr("sys.argv", ["regression.py"])
    return regression.cli_main(["fit", "--config", str(config), *options])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from LightningCLI
def test_lightning_cli_adds_callbacks_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "written.yaml"
    config.write_text(CONFIG.format(folder=tmp_path / "logs"))
    cli = fit(
        config,
        monkeypatch,
        *("--trainer.callbacks+=lightning_bigopt.LearningRateScheduler",),
        *("--trainer.callbacks.schedule=lightning_bigopt.Linear",),
        *("--trainer.callbacks+=lightning_bigopt.GradientClipping",),
        *("--trainer.callbacks.rule=lightning_bigopt.AutoClip",),
        *("--trainer.callbacks+=lightning_bigopt.OptimizationMonitor",),
    )
    assert cli.trainer.global_step == 40
    schedule = Linear()
    expected = [0.02 * schedule(t / 40) for t in range(40)]
    assert series(tmp_path / "logs", "optim/lr") == pytest.approx(expected)
    assert expected[0] == 0.02
    assert series(tmp_path / "logs", "clip/coefficient")[0] == pytest.approx(1.0, abs=1e-4)
    assert "lightning_bigopt.AutoClip" in (tmp_path / "logs" / "config.yaml").read_text()
    first, *_, last = series(tmp_path / "logs", "train_loss")
    assert last < first
