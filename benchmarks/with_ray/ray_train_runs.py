"""Training with Ray Train: two workers, checkpoints reported to Ray, workers that are killed.

The module, the loader, the callbacks and the records are those of the killed runs without Ray
(`tests/faults/killed_training.py`); Ray brings strategy, environment, checkpoints and restarts.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import ray.train
import ray.train.lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from tests.faults.killed_training import Case, KilledModule, Records
from tests.helpers import QUIET

CASE = Case(
    loader="exact", precision="32-true", norm="LayerNorm", guard=True, number=4, processes=2
)


@dataclass(frozen=True)
class Run:
    """One run with Ray Train.

    Args:
        title: What the table shows.
        folder: Folder of its files.
        kills: Rank and update of each worker that is killed, in this order.
        reports: Number of updates between two checkpoints, or "epoch" for those of
            RayTrainReportCallback.
        report_first: Whether the callback that reports stands before ours.
    """

    title: str
    folder: str
    kills: tuple[tuple[int, int], ...] = ()
    reports: int | str = "epoch"
    report_first: bool = False


class KillsWorker(L.Callback):
    """Kills this process before an update is trained, once for each entry of ``kills``."""

    def __init__(self, folder: Path, kills: tuple[tuple[int, int], ...]) -> None:
        self.folder, self.kills = folder, kills

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        for number, (rank, update) in enumerate(self.kills):
            mark = self.folder / f"killed-{number}"
            if not mark.exists():
                if (rank, update) == (trainer.global_rank, trainer.global_step):
                    # Ray resumes from a checkpoint once its controller has seen it. The controller
                    # asks the workers every two seconds; these updates take milliseconds.
                    ray.train.get_all_reported_checkpoints(timeout_s=60)
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return


class ReportsAfterUpdates(L.Callback):
    """Reports a checkpoint to Ray after every few updates, also in the middle of an epoch."""

    def __init__(self, every: int) -> None:
        self.every, self.reported = every, 0

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        step = trainer.global_step
        if step % self.every or step == self.reported:
            return
        self.reported = step
        with tempfile.TemporaryDirectory() as folder:
            trainer.save_checkpoint(Path(folder) / "checkpoint.ckpt")
            # All workers report, and the checkpoint is that of rank 0.
            checkpoint = Checkpoint.from_directory(folder) if trainer.is_global_zero else None
            ray.train.report({"step": step}, checkpoint=checkpoint)


def train(config: dict[str, Any]) -> None:
    """Trains on one worker, from the newest checkpoint if Ray has one."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path, run = Path(config["folder"]), config["run"]
    rank = ray.train.get_context().get_world_rank()
    attempt = len(list(path.glob("killed-*")))
    random.seed(rank)
    records = Records(path / f"records-{rank}.jsonl", attempt)
    callbacks = CASE.callbacks()
    callbacks[-1].records = records
    reports: L.Callback = (
        ray.train.lightning.RayTrainReportCallback()
        if run.reports == "epoch"
        else ReportsAfterUpdates(int(run.reports))
    )
    order = [reports, *callbacks] if run.report_first else [*callbacks, reports]
    module = KilledModule(CASE, records)
    torch.manual_seed(100 + rank)
    trainer = L.Trainer(
        **QUIET
        | CASE.limit()
        | {
            "devices": "auto",
            "strategy": ray.train.lightning.RayDDPStrategy(),
            "plugins": [ray.train.lightning.RayLightningEnvironment()],
            "callbacks": [*order, KillsWorker(path, run.kills)],
            "logger": TensorBoardLogger(path, name="", version="log"),
            "log_every_n_steps": 1,
        }
    )
    trainer = ray.train.lightning.prepare_trainer(trainer)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        trainer.fit(module, CASE.data())
    else:
        with checkpoint.as_directory() as folder:
            state = Path(folder) / "checkpoint.ckpt"
            resumed_at = torch.load(state, weights_only=True)["global_step"]
            (path / f"resumed-{attempt}-{resumed_at}").touch()
            trainer.fit(module, CASE.data(), ckpt_path=state, weights_only=True)
    trainer.save_checkpoint(path / "final.ckpt")
    final = {"module": module.state_dict(), "random": torch.get_rng_state()}
    torch.save(final, path / f"final-{rank}.pt")


def start(run: Run, folder: Path) -> None:
    """Trains a run with two workers; Ray restarts them as often as they are killed."""
    folder.mkdir(parents=True)
    TorchTrainer(
        train,
        train_loop_config={"folder": str(folder), "run": run},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name=run.folder,
            storage_path=str(folder / "storage"),
            failure_config=FailureConfig(max_failures=len(run.kills)),
        ),
    ).fit()
