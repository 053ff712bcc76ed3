"""Runs that SLURM's signal requeues at random moments equal uninterrupted ones to the bit."""

from __future__ import annotations

import multiprocessing
import os
import signal
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from lightning_bigopt import (
    BatchSizeScheduler,
    ConstantBatchSize,
    GlobalBatchLoader,
    LearningRateScheduler,
    Linear,
)
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
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_requeued_run_of_two_processes_equals_uninterrupted_run(name: str, tmp_path: Path) -> None:
    case = Case("exact", "32-true", "BatchNorm", True, 0, 2, requeue_signal=name, pause=0.0)
    result, _ = requeued_and_compared(case, tmp_path, signals=2, seed=0)
    assert result.differences == []
    assert result.kills


# Updates in the checkpoint. A signal after the last update of an epoch is handled after the next.
MOMENTS = {"window": 4, "optimizer step": 4, "validation": 4, "end of an epoch": 5}


class SignalToFirst(L.LightningModule):
    """Process 0 alone receives the signal, at a moment around the fourth of six updates."""

    def __init__(self, moment: str = "", number: signal.Signals = signal.SIGUSR1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 3)
        self.moment, self.number = moment, number
        self.gathered: list[list[float]] = []

    def send_in(self, moment: str, *, at: int) -> None:
        if self.moment == moment and self.global_rank == 0 and self.trainer.global_step == at:
            self.moment = ""
            signal.raise_signal(self.number)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx % 2 == 1:
            self.send_in("window", at=3)
        return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        self.send_in("optimizer step", at=3)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.send_in("validation", at=4)
        self.gathered.append(self.all_gather(torch.tensor(float(self.global_rank))).tolist())

    def on_train_epoch_end(self) -> None:
        self.send_in("end of an epoch", at=4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(module: SignalToFirst, folder: Path) -> None:
    """Trains six updates of two micro-batches on each process, in three epochs."""
    options = {**QUIET, "max_steps": -1, "num_sanity_val_steps": 0, "max_epochs": 3}
    trainer = L.Trainer(
        **options,
        devices=2,
        strategy="ddp",
        default_root_dir=folder,
        plugins=[SLURMEnvironment(requeue_signal=module.number)],
        callbacks=[LearningRateScheduler(Linear()), BatchSizeScheduler(ConstantBatchSize(8))],
    )
    data = GlobalBatchLoader(Regression(16), micro_batch_size=2, seed=1)
    trainer.fit(module, data, DataLoader(Regression(16), batch_size=2), weights_only=True)
    assert trainer.global_step == 6
    assert module.gathered == [[0.0, 1.0]] * len(module.gathered)


def train_with_signals(folder: str, rank: int, port: int) -> None:
    """Trains one of two processes of a job of SLURM with a signal at every moment, and resumes."""
    case = Case("exact", "32-true", "BatchNorm", False, 0, 2)
    os.environ |= slurm_variables(Path(folder), case, rank=rank, port=port)
    straight = SignalToFirst()
    fit(straight, Path(folder))
    for number, moment in product((signal.SIGUSR1, signal.SIGTERM), MOMENTS):
        own = Path(folder) / f"{number.name} {moment}"
        if number == signal.SIGTERM:  # after which Lightning ends the run
            with pytest.raises(SIGTERMException):
                fit(SignalToFirst(moment, number), own)
        else:
            fit(SignalToFirst(moment, number), own)
        resumed = SignalToFirst("", number)
        fit(resumed, own)
        for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(one, other), (number, moment)


@pytest.mark.slow
@pytest.mark.distributed
def test_signal_of_one_process_saves_on_both_and_resumes_to_the_bit(tmp_path: Path) -> None:
    context, port = multiprocessing.get_context("spawn"), free_port()
    processes = [
        context.Process(target=train_with_signals, args=(str(tmp_path), rank, port))
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()  # without effect on a process that has ended
    assert [process.exitcode for process in processes] == [0, 0]
    for name, moment in product(("SIGUSR1", "SIGTERM"), MOMENTS):
        (saved,) = (tmp_path / f"{name} {moment}").glob("hpc_ckpt_*.ckpt")
        assert torch.load(saved, weights_only=True)["global_step"] == MOMENTS[moment]
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 4711\n" * 2 * len(MOMENTS)
