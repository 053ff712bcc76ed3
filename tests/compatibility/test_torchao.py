"""Low-bit optimizers of torchao, whose states are tensor subclasses: checkpoints and rollbacks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO
from torch import Tensor, nn

from lightning_bigopt import (
    GradientClipping,
    LearningRateScheduler,
    NormClip,
    StepGuard,
    WarmupLinear,
)
from tests.helpers import QUIET, ResumableLoader, SaveAt

torchao = pytest.importorskip("torchao.optim")
KINDS = ("AdamW8bit", "AdamW4bit", "AdamWFp8")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _without_compilation() -> Iterator[None]:
    """torchao compiles its step, which takes seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


class Wide(L.LightningModule):
    """Has a weight of 4096 elements, from which on torchao quantizes."""

    def __init__(self, kind: str = "AdamW8bit") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 3))
        self.kind = kind

    def configure_optimizers(self) -> Any:
        return getattr(torchao, self.kind)(self.parameters(), lr=0.01)

    def training_step(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def test_step(self, batch: Any) -> None:
        self.training_step(batch)


def callbacks() -> list[L.Callback]:
    return [
        LearningRateScheduler(WarmupLinear(warmup=3)),
        GradientClipping(NormClip(max_norm=1.0)),
        StepGuard(),
    ]


def trainer(*extra: L.Callback, **options: Any) -> L.Trainer:
    own = options.pop("own", True)
    listed = [*(callbacks() if own else []), *extra]
    return L.Trainer(**{**QUIET, "max_steps": 9, "callbacks": listed, **options})


def fit(module: L.LightningModule, runner: L.Trainer, **options: Any) -> L.LightningModule:
    runner.fit(module, ResumableLoader(24, 4), **options)
    return module


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of AdamW8bit in the middle of the first epoch of six updates."""
    fit(Wide(), trainer(SaveAt(tmp_path / "four.ckpt", 4)))
    return tmp_path / "four.ckpt"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights_only", [None, True])
def test_resumed_run_equals_a_straight_one(
    kind: str, weights_only: bool | None, tmp_path: Path
) -> None:
    straight = fit(Wide(kind), trainer(SaveAt(tmp_path / "four.ckpt", 4)))
    runner = trainer()
    resumed = fit(Wide(kind), runner, ckpt_path=tmp_path / "four.ckpt", weights_only=weights_only)
    state = runner.optimizers[0].state[resumed.net[1].weight]
    assert type(state["exp_avg"]).__name__.startswith("OptimState")
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_bare_trainer_cannot_load_the_checkpoint(saved: Path) -> None:
    """If Lightning has fixed this, trainer_access/checkpoint_loading.py is not needed any more."""
    with pytest.raises(RuntimeError, match="Callable map_location not supported"):
        fit(Wide(), trainer(own=False), ckpt_path=saved)


def test_checkpoint_of_a_bare_trainer_loads(tmp_path: Path) -> None:
    fit(Wide(), trainer(SaveAt(tmp_path / "four.ckpt", 4), own=False))
    runner = trainer(GradientClipping(NormClip(max_norm=1e9)), own=False)
    resumed = fit(Wide(), runner, ckpt_path=tmp_path / "four.ckpt")
    straight = fit(Wide(), trainer(own=False))
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_evaluation_loads_the_checkpoint(saved: Path) -> None:
    runner = trainer()
    runner.test(Wide(), ResumableLoader(8, 4), ckpt_path=saved, verbose=False)
    assert "load_checkpoint" not in vars(runner.strategy.checkpoint_io)


def test_plugin_that_saves_in_a_thread_loads_it(saved: Path) -> None:
    runner = trainer(plugins=[AsyncCheckpointIO()])
    fit(Wide(), runner, ckpt_path=saved)
    assert runner.global_step == 9


def test_plugin_of_the_user_gets_the_arguments_of_lightning(saved: Path) -> None:
    seen: list[dict[str, Any]] = []

    class Own(TorchCheckpointIO):
        def load_checkpoint(self, path: Any, **options: Any) -> Any:
            seen.append(options)
            return super().load_checkpoint(path, "cpu", **options)

    fit(Wide(), trainer(plugins=[Own()]), ckpt_path=saved, weights_only=True)
    assert seen == [{"weights_only": True}]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_on_the_trainer(fails: bool, tmp_path: Path) -> None:
    class Fails(Wide):
        def training_step(self, batch: Any) -> Tensor:
            if fails:
                raise KeyError
            return super().training_step(batch)

    runner = trainer()
    if fails:
        with pytest.raises(KeyError):
            fit(Fails(), runner)
    else:
        fit(Fails(), runner)
    assert "load_checkpoint" not in vars(runner.strategy.checkpoint_io)


def test_missing_file_raises_the_error_of_lightning(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Checkpoint file not found"):
        fit(Wide(), trainer(), ckpt_path=tmp_path / "missing.ckpt")


@pytest.mark.slow
def test_module_that_imports_torchao_later_resumes(saved: Path) -> None:
    """torchao registers its classes as safe when it is imported, here after the checkpoint."""
    script = f"""
import warnings
warnings.simplefilter("ignore")
import sys, torch
from tests.helpers import QUIET, ResumableLoader
from lightning_bigopt import GradientClipping, NormClip
import lightning as L
from torch import nn

class Late(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 3))
    def training_step(self, batch):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])
    def configure_optimizers(self):
        from torchao.optim import AdamW8bit
        return AdamW8bit(self.parameters(), lr=0.01)

assert "torchao" not in sys.modules
callbacks = [GradientClipping(NormClip(max_norm=1.0))]
trainer = L.Trainer(**{{**{QUIET!r}, "max_steps": 4, "callbacks": callbacks}})
trainer.fit(Late(), ResumableLoader(24, 4), ckpt_path={str(saved)!r}, weights_only=True)
print(type(trainer.optimizers[0].state[trainer.lightning_module.net[1].weight]["exp_avg"]))
"""
    found = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "OptimState8bit" in found.stdout, found.stderr[-2000:]
