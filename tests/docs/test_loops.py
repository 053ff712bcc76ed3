"""The loops of the page train as a Trainer with the callbacks does, to the bit."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision as FabricMixedPrecision
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from lightning_bigopt import (
    GradientClipping,
    LearningRateScheduler,
    NonFinite,
    NormClip,
    NormSpike,
    StepGuard,
    WarmupCosine,
)
from lightning_bigopt.engine.capability import Capability

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recipes" / "loops.md").read_text(encoding="utf-8")
FILES = ("problem.py", "loop.py", "fabric_loop.py")

History = list[tuple[float, float, bool]]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """Writes the files of the page, and imports them."""
    scripts = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for name, script in zip(FILES, scripts, strict=True):
        (tmp_path / name).write_text(script)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names = [name.removesuffix(".py") for name in FILES]
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        del sys.modules[name]


class Recorder(Capability):
    """Records learning rate, norm and decision of every update."""

    owns, rank = "record", 95

    def __init__(self) -> None:
        self.history: History = []

    def needs_norms(self, update: Any) -> bool:
        return True

    def observe(self, update: Any) -> None:
        norm = update.norms.total.item()
        accepted = update.rejection is None and math.isfinite(norm)
        self.history.append((update.optimizer.param_groups[0]["lr"], norm, accepted))


class Regression(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def train_with_trainer(problem: ModuleType, **options: Any) -> tuple[nn.Module, History]:
    recorder, module = Recorder(), Regression(problem.make_model())
    trainer = Trainer(
        accelerator="cpu",
        max_steps=problem.STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            LearningRateScheduler(WarmupCosine(warmup="10%")),
            GradientClipping(NormClip(max_norm=1.0)),
            StepGuard([NonFinite(), NormSpike(armed=10)]),
            recorder,
        ],
        **options,
    )
    trainer.fit(module, DataLoader(problem.make_data(), batch_size=problem.BATCH_SIZE))
    return module.model, recorder.history


def assert_equal(ran: tuple[nn.Module, History], expected: tuple[nn.Module, History]) -> None:
    assert str(ran[1]) == str(expected[1])  # as text, because nan differs from itself
    weights = [list(model.state_dict().values()) for model, _ in (ran, expected)]
    assert all(map(torch.equal, *weights))


pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec. is deprecated"),
]


def test_plain_loop_equals_the_trainer(project):
    expected = train_with_trainer(project["problem"])
    assert_equal(project["loop"].train(), expected)
    decisions = [accepted for _, _, accepted in expected[1]]
    assert len(decisions) == 40
    assert [step for step, accepted in enumerate(decisions) if not accepted] == [25]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric_equals_the_trainer(project, precision):
    fabric = Fabric(accelerator="cpu", precision=precision)
    ran = project["fabric_loop"].train(fabric)
    assert_equal(ran, train_with_trainer(project["problem"], precision=precision))


def test_fabric_with_a_scaler_that_overflows_equals_the_trainer(project):
    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**17, growth_interval=5)

    mixed = FabricMixedPrecision("16-mixed", "cpu", scaler())
    ran = project["fabric_loop"].train(Fabric(accelerator="cpu", plugins=mixed))
    plugin = MixedPrecision("16-mixed", "cpu", scaler())
    assert_equal(ran, train_with_trainer(project["problem"], plugins=plugin))
    skipped = [math.isfinite(norm) for _, norm, accepted in ran[1] if not accepted]
    assert skipped.count(False) >= 2  # overflows


def test_resumed_fabric_run_equals_one_that_is_not_stopped(project):
    train = project["fabric_loop"].train
    expected = train(Fabric(accelerator="cpu"), checkpoint="other.ckpt")
    _, first = train(Fabric(accelerator="cpu"), stop_at=23)
    model, second = train(Fabric(accelerator="cpu"))
    assert (len(first), len(second)) == (23, 17)
    assert_equal((model, first + second), expected)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_measure_the_norm_of_the_global_batch(project, tmp_path):
    _, command, _ = re.findall(r"^python (fabric_loop\.py.*)$", PAGE, re.MULTILINE)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("MASTER_PORT", None)
    done = subprocess.run(
        [sys.executable, *shlex.split(command)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"history_{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    expected = train_with_trainer(project["problem"])[1]
    rates, norms, decisions = zip(*ranks[0], strict=True)
    assert (rates, decisions) == tuple(zip(*expected, strict=True))[::2]
    assert norms == pytest.approx([norm for _, norm, _ in expected], rel=1e-5)
