"""Three Lightning scripts that were not written for this package get its callbacks."""

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


def quiet(folder: Path) -> dict[str, Any]:
    return {
        "logger": TensorBoardLogger(folder, name="", version=""),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


def series(folder: Path, tag: str) -> list[float]:
    return list(read_scalars(folder)[tag].values())


def test_a_gan_in_manual_optimization(tmp_path: Path) -> None:
    callbacks = [
        LearningRateScheduler(WarmupCosine(warmup="25%", end=0.0)),
        GradientClipping(NormClip(max_norm=0.05)),
        StepGuard(),
        OptimizationMonitor(),
    ]
    trainer = gan.main(callbacks=callbacks, **quiet(tmp_path))
    # 4 epochs of 8 batches: both optimizers follow one curve, each from its own rate.
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


def test_a_gan_is_told_that_its_batches_are_its_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"automatic_optimization must be True .*; "):
        gan.main(callbacks=[BatchSizeScheduler(ConstantBatchSize(64))], **quiet(tmp_path))


def ours(**options: Any) -> list[L.Callback]:
    return [
        LearningRateScheduler(WarmupStableDecay(warmup="25%", decay="25%"), **options),
        GradientClipping(ZClip()),
        StepGuard(),
        BatchSizeScheduler(ConstantBatchSize(128)),
        GradientNoiseScale(),
        OptimizationMonitor(),
    ]


def test_a_classifier_is_told_of_its_own_scheduler_and_of_the_clipping_left_on(
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match=r"got StepLR; .*pass module_scheduler='replace'"):
        digits.main(ours(), **quiet(tmp_path))
    with pytest.raises(ValueError, match=r"gradient_clip_val must be None .*keep one of them"):
        digits.main(ours(module_scheduler="replace"), gradient_clip_val=0.5, **quiet(tmp_path))


def test_a_classifier_with_the_remedy_trains_and_resumes(tmp_path: Path) -> None:
    whole = digits.main(ours(module_scheduler="replace"), **quiet(tmp_path / "whole"))
    # 1258 images in batches of 64: 20 a epoch, by twos; 4 epochs make 40 updates.
    assert whole.global_step == 40
    used = series(tmp_path / "whole", "optim/lr")
    factors = [
        t / 10 if t < 10 else 1.0 if t < 30 else 1 - math.sqrt((t - 30) / 10) for t in range(40)
    ]
    assert used == pytest.approx([0.01 * factor for factor in factors])
    assert series(tmp_path / "whole", "batch/global_size")[:9] == [128.0] * 9
    assert len(series(tmp_path / "whole", "grad_norm/total")) == 40
    assert float(whole.callback_metrics["val_acc"]) > 0.8
    # What LearningRateMonitor, a stranger, sees.
    watched = series(tmp_path / "whole", "lr-AdamW")
    assert max(watched) == pytest.approx(0.01)

    path = next((tmp_path / "whole").rglob("epoch=1-*.ckpt"))
    resumed = digits.main(
        ours(module_scheduler="replace"), str(path), **quiet(tmp_path / "resumed")
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI's own use of jsonargparse
def test_a_lightning_cli_gets_them_on_the_command_line(
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
