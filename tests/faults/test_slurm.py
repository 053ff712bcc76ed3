"""Runs that SLURM's signal requeues at random moments equal uninterrupted ones to the bit."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch.utils.data import DataLoader

from lightning_bigopt import LearningRateScheduler, Linear
from notebooks.run import free_port
from tests.faults.killed_training import Case, slurm_variables
from tests.faults.slurm import requeued_and_compared
from tests.helpers import QUIET, Regression


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["stateful", "exact"])
def test_requeued_run_equals_uninterrupted_run(loader: str, tmp_path: Path) -> None:
    case = Case(loader, "32-true", "BatchNorm", True, 7, requeue_signal="SIGUSR1", pause=0.0)
    result, _ = requeued_and_compared(case, tmp_path, signals=3, seed=0)
    assert result.differences == []
    assert result.kills


@pytest.mark.slow
@pytest.mark.distributed
def test_requeued_run_of_two_processes_equals_uninterrupted_run(tmp_path: Path) -> None:
    case = Case("exact", "32-true", "BatchNorm", True, 0, 2, requeue_signal="SIGUSR1", pause=0.0)
    result, _ = requeued_and_compared(case, tmp_path, signals=2, seed=0)
    assert result.differences == []
    assert result.kills


class SignalInValidation(L.LightningModule):
    """Process 0 alone receives the signal, in a validation whose batches have collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
        self.gathered: list[list[float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.global_rank == 0 and self.trainer.global_step == 4 and batch_idx == 1:
            signal.raise_signal(signal.SIGUSR1)
        self.gathered.append(self.all_gather(torch.tensor(float(self.global_rank))).tolist())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def train_with_signal(folder: str, rank: int, port: int) -> None:
    """Trains one of two processes of a job of SLURM."""
    case = Case("exact", "32-true", "BatchNorm", False, 0, 2)
    os.environ |= slurm_variables(Path(folder), case, rank=rank, port=port)
    module, options = SignalInValidation(), {**QUIET, "max_steps": -1, "num_sanity_val_steps": 0}
    trainer = L.Trainer(
        **options,
        max_epochs=3,
        devices=2,
        strategy="ddp",
        default_root_dir=folder,
        plugins=[SLURMEnvironment()],
        callbacks=[LearningRateScheduler(Linear())],
    )
    data = [DataLoader(Regression(16), batch_size=2) for _ in range(2)]
    trainer.fit(module, *data)
    assert trainer.global_step == 12
    assert module.gathered == [[0.0, 1.0]] * len(module.gathered)


@pytest.mark.slow
@pytest.mark.distributed
def test_signal_of_one_process_in_a_validation_waits_for_its_end(tmp_path: Path) -> None:
    context, port = multiprocessing.get_context("spawn"), free_port()
    processes = [
        context.Process(target=train_with_signal, args=(str(tmp_path), rank, port))
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
        process.kill()  # without effect on a process that has ended
    assert [process.exitcode for process in processes] == [0, 0]
    (saved,) = tmp_path.glob("hpc_ckpt_*.ckpt")
    assert torch.load(saved, weights_only=True)["global_step"] == 4
