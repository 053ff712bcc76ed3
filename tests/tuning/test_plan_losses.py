"""The expected loss in a plan: learning rates of the run, alternatives, warnings, picture, CLI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    LearningRateScheduler,
    LossLaw,
    MultiPowerLaw,
    Schedule,
    WarmupConstant,
    WarmupCosine,
    WarmupStableDecay,
    plan,
)
from lightning_bigopt.cli import __main__ as cli

LAW = MultiPowerLaw(floor=3.0, scale=0.5, alpha=0.5, drop=1.0, drop_speed=2.0, beta=0.6, gamma=0.65)
KNOWN = LossLaw(law=LAW, unseen=0.01, extrapolation=0.01, peaks=(0.1, 0.1), total=30.0)


def planned(*callbacks: Any, law: Any = KNOWN, max_steps: int = 400, **options: Any) -> Any:
    trainer = Trainer(
        max_steps=max_steps,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        **options,
    )
    model = BoringModel()
    model.configure_optimizers = lambda: torch.optim.SGD(  # type: ignore[method-assign]
        model.parameters(), lr=0.1, fused=True
    )
    return plan(trainer, model, DataLoader(torch.ones(6400, 32), batch_size=8), law=law)


@pytest.mark.parametrize(
    "schedule",
    [WarmupCosine(warmup="10%", end=0.0), WarmupStableDecay(warmup=40, decay="30%")],
    ids=lambda schedule: type(schedule).__name__,
)
def test_expected_loss_follows_the_learning_rates_of_the_run(schedule: Schedule) -> None:
    found = planned(LearningRateScheduler(schedule))
    first = found.expected_loss
    true = LAW.losses(schedule.values(400, base=0.1), first.updates)
    assert first.losses == pytest.approx(list(true), abs=1e-6)
    assert first.updates[-1] == 400
    assert not [text for text in found.warnings if "loss" in text]


@pytest.mark.slow
def test_learning_rates_of_a_long_run_are_interpolated() -> None:
    schedule, updates = WarmupStableDecay(warmup="1%", decay="20%"), 50_000
    found = planned(LearningRateScheduler(schedule), max_steps=updates).expected_losses
    exact = KNOWN.predict_learning_rates(schedule.values(updates, base=0.1))
    assert found[0].updates[-1] == updates
    assert np.interp(found[0].updates, exact.updates, exact.losses) == pytest.approx(
        found[0].losses, abs=1e-4
    )
    cosine = WarmupCosine(warmup="1%", end=0.1).values(updates, base=0.1)
    others = {expected.name: expected.final for expected in found}
    expected = KNOWN.predict_learning_rates(cosine).final
    assert others["WarmupCosine(end=0.1)"] == pytest.approx(expected, abs=1e-5)


def test_alternatives_have_the_warmup_and_the_peak_of_the_run() -> None:
    found = planned(LearningRateScheduler(WarmupStableDecay(warmup="10%", decay="30%")))
    by_name = {expected.name: expected.final for expected in found.expected_losses}
    for name, schedule in {
        "WarmupConstant()": WarmupConstant(warmup="10%"),
        "WarmupCosine(end=0.1)": WarmupCosine(warmup="10%", end=0.1),
    }.items():
        true = LAW.losses(schedule.values(400, base=0.1), [400])[0]
        assert by_name[name] == pytest.approx(true, abs=1e-6)
    table = str(found).split("\n\n")[-1].splitlines()
    assert table[0].split() == ["schedule", "expected", "loss", "90", "%", "band"]
    finals = [float(line[-30:].split()[0]) for line in table[1:6]]
    assert finals == sorted(finals)
    assert len(by_name) == 5


def test_plan_without_a_scheduler_expects_the_loss_of_a_constant_learning_rate() -> None:
    found = planned()
    assert found.expected_loss.final == pytest.approx(LAW.losses([0.1] * 400, [400])[0])


def test_a_changing_batch_and_an_unknown_length_are_warnings() -> None:
    ramp = BatchSizeScheduler(BatchSizeSteps({"0%": 8, "50%": 16}))
    found = planned(LearningRateScheduler(WarmupCosine(warmup=10)), ramp)
    assert any("the batch size changes" in text for text in found.warnings)
    tokens = LearningRateScheduler(
        WarmupCosine(warmup="10%"), budget="1e4 tokens", tokens=lambda batch: batch.numel()
    )
    found = planned(tokens, max_steps=-1)
    assert found.expected_loss is None
    assert any("number of updates is not known" in text for text in found.warnings)


def test_a_scheduler_of_the_module_is_a_warning() -> None:
    trainer = Trainer(max_steps=10, accelerator="cpu", logger=False, enable_checkpointing=False)
    found = plan(trainer, BoringModel(), DataLoader(torch.ones(64, 32), batch_size=8), law=KNOWN)
    assert found.expected_loss is None
    assert any("the module has its own learning-rate scheduler" in t for t in found.warnings)


def test_another_learning_rate_than_that_of_the_pilots_is_a_warning() -> None:
    law = LossLaw(law=LAW, peaks=(0.01, 0.02), total=1.0)
    found = planned(LearningRateScheduler(WarmupCosine(warmup=10)), law=law)
    assert any("0.1 is outside those of the pilots, 0.01 to 0.02" in t for t in found.warnings)


def test_picture_has_a_second_panel_with_the_band(tmp_path: Path) -> None:
    found = planned(LearningRateScheduler(WarmupCosine(warmup=10)))
    text = found.picture(tmp_path / "plan.svg").read_text(encoding="utf-8")
    assert "other schedules" in text
    low, high = found.expected_loss.final_band
    assert f"90 % band {low:.3f} to {high:.3f}" in text
    assert "learning rate" in text


def test_invalid_law() -> None:
    with pytest.raises(ValueError, match="law must be a LossLaw"):
        planned(law="law")


CONFIG = """\
model:
  class_path: BytesGPT
  init_args: {width: 8, layers: 1, heads: 1, length: 8, lr: 0.1}
data:
  class_path: SourceText
  init_args: {micro_batch_size: 4, length: 8, validation_samples: 8}
trainer:
  max_steps: 400
  accelerator: cpu
  logger: false
  callbacks:
    - class_path: LearningRateScheduler
      init_args: {schedule: {class_path: WarmupCosine, init_args: {warmup: 10%}}}
"""


def write_pilot(folder: Path, schedule: Schedule, updates: int) -> None:
    """Writes the CSV of a run whose loss is that of the law."""
    rates = schedule.values(updates, base=0.1)
    losses = LAW.losses(rates, range(2, updates + 1))
    lines = [f"{step},{rates[step]},{loss}" for step, loss in enumerate(losses, start=1)]
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("\n".join(["step,lr-AdamW,loss", *lines]))


@pytest.mark.slow
def test_command_predicts_from_pilots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    for name, schedule in {
        "constant": WarmupConstant(warmup=20),
        "cosine": WarmupCosine(warmup=20, end=0.0),
    }.items():
        write_pilot(tmp_path / "pilots" / name, schedule, 200)
    code = cli.main(["plan", "config.yaml", "--pilots", "pilots", "--loss", "loss"])
    assert code == 0
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("this run"))
    expected = LAW.losses(WarmupCosine(warmup="10%").values(400, base=0.1), [400])[0]
    assert float(line.split()[2]) == pytest.approx(expected, abs=0.02)
    low, high = (float(line.split()[i]) for i in (3, 5))
    assert low < expected < high
    assert np.isfinite([low, high]).all()


def test_command_names_the_loss_that_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    write_pilot(tmp_path / "pilots" / "a", WarmupConstant(warmup=20), 60)
    assert cli.main(["plan", str(config), "--pilots", str(tmp_path / "pilots")]) == 1
    assert "loss must be the name of a value in the logs, got 'val_loss'" in capsys.readouterr().err
