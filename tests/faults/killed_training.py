"""A training run that may be killed at any moment, and what it records for a comparison.

``train`` runs in a process of its own, which is forked from a process that has imported
everything. It appends what each update has used to files that survive a kill.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.utils.tensorboard  # imported before the processes are forked
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_bigopt import (
    AutoClip,
    Backoff,
    BatchSizeScheduler,
    BatchSizeSteps,
    ConstantBatchSize,
    Cosine,
    GlobalBatchLoader,
    GradientClipping,
    LearningRateScheduler,
    NonFinite,
    NormClip,
    NormSpike,
    OptimizationMonitor,
    Skip,
    StepGuard,
    WarmupStableDecay,
    ZClip,
)
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.update import Update
from tests.helpers import QUIET, Regression, ResumableLoader

LOADERS = ("stateful", "exact", "exact, 2 workers")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
SAMPLES = 240
MICRO = 3
RAMP = {"0%": 8, "40%": 12, "75%": 20}
BAD_UPDATES = {15: 1e4, 28: 1e4, 29: 1e4}  # factors on the loss
RULES = (NormClip(max_norm=0.5), ZClip(warmup=8), AutoClip(percentile=60.0))


@dataclass(frozen=True)
class Case:
    """A configuration of the training.

    Args:
        loader: One of :data:`LOADERS`: one with a saved position, or GlobalBatchLoader.
        precision: One of :data:`PRECISIONS`.
        norm: ``"BatchNorm"`` or ``"LayerNorm"``.
        guard: Whether StepGuard is used, and one update has a loss of NaN.
        number: Selects ramp, clipping rule, schedule and limit, and whether the module logs.
        processes: Number of processes.
        updates: Updates of the whole run, if ``number`` selects ``max_steps``.
        pause: Seconds that each batch sleeps.
        requeue_signal: Name of the signal with which SLURM announces the end of a job. The run is
            then one of SLURM, validates, and resumes from the checkpoint that the signal saved.
    """

    loader: str
    precision: str
    norm: str
    guard: bool
    number: int
    processes: int = 1
    updates: int = 48
    pause: float = 0.002
    requeue_signal: str = ""

    @property
    def has_ramp(self) -> bool:
        """Whether the batch size grows during the run."""
        return self.number % 2 == 0

    @property
    def module_logs(self) -> bool:
        """Whether the module logs its loss, too; Lightning flushes the log then."""
        return self.number % 4 < 2

    @property
    def repeats_windows(self) -> bool:
        """Whether a resume from a checkpoint inside a window trains the whole window again."""
        return self.loader != "stateful"

    def __str__(self) -> str:
        guard = "guard" if self.guard else "no guard"
        ramp = "ramp" if self.has_ramp else "no ramp"
        rule = type(self.rule).__name__
        text = f"{self.loader}, {self.precision}, {self.norm}, {guard}, {ramp}, {rule}"
        return f"{text}, {self.requeue_signal}" if self.requeue_signal else text

    @property
    def rule(self) -> Any:
        """The clipping rule."""
        return RULES[self.number % 3]

    def limit(self) -> dict[str, int]:
        """Returns the limit of the run as an argument of the Trainer."""
        if self.number % 5 == 0:
            return {"max_epochs": max(1, self.updates // 20)}
        return {"max_steps": self.updates}

    def callbacks(self) -> list[Any]:
        """Returns the capabilities of the run."""
        schedules = (WarmupStableDecay(warmup="10%", decay="30%"), Cosine(end=0.1))
        found: list[Any] = [
            LearningRateScheduler(schedules[self.number // 2 % 2]),
            GradientClipping(self.rule),
        ]
        if self.has_ramp:
            found.append(BatchSizeScheduler(BatchSizeSteps(RAMP), lr_scaling="sqrt"))
        elif self.loader != "stateful":
            found.append(BatchSizeScheduler(ConstantBatchSize(12)))
        if self.guard:
            detectors = [NonFinite(), NormSpike(32, armed=8)]
            found.append(StepGuard(detectors, actions=[Skip(), Backoff(recover=10)]))
        return [*found, OptimizationMonitor(), RecordsDecisions()]

    def data(self) -> Any:
        """Returns the training loader."""
        if self.loader == "stateful":
            return ResumableLoader(SAMPLES, 4)
        # In a child of a forkserver, workers are started by another forkserver by default.
        workers = {"num_workers": 2, "options": {"multiprocessing_context": "fork"}}
        return GlobalBatchLoader(
            NoisySamples(SAMPLES),
            micro_batch_size=MICRO,
            seed=5,
            randomness="sample",
            **(workers if "workers" in self.loader else {}),
        )

    def precision_options(self) -> dict[str, Any]:
        """Returns arguments of the Trainer; the scale of the GradScaler grows until it overflows.

        Lightning turns ``precision="16-mixed"`` on a CPU into ``"bf16-mixed"``.
        """
        if self.precision != "16-mixed":
            return {"precision": self.precision}
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=4)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


class NoisySamples(Dataset[Any]):
    """Regression with random noise, drawn whenever a sample is fetched."""

    def __init__(self, size: int) -> None:
        self.data = Regression(size)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        x, y, index = self.data[index]
        return x + 0.1 * torch.randn(4), y, index


class Records:
    """Appends records to a file, each in one write, which a kill cannot cut in two."""

    def __init__(self, path: Path, run: int) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.run = run

    def write(self, kind: str, step: int, value: Any) -> None:
        text = json.dumps({"run": self.run, "kind": kind, "step": step, "value": value})
        os.write(self.file, text.encode() + b"\n")


class RecordsDecisions(Capability):
    """Records norm, clip coefficient and rejection of every update."""

    owns = "records"
    rank = 95
    needs_samples = None
    needs_step_hook = False
    may_reject = False
    records: Records | None = None

    def observe(self, update: Update) -> None:
        assert self.fit is not None
        assert self.records is not None
        decision = update.decision
        coefficient = None if decision is None else repr(float(decision.coefficient))
        reason = None if update.rejection is None else update.rejection.reason
        value = [repr(float(update.norms.total)), coefficient, reason]
        self.records.write("decision", self.fit.trainer.global_step, value)


class KilledModule(L.LightningModule):
    """A network with normalization and dropout that records what every update uses.

    Checkpoints contain the state of torch's random generator at the beginning of the current
    accumulation window, for every process: without it, dropout is another one after a resume.
    """

    def __init__(self, case: Case, records: Records) -> None:
        super().__init__()
        torch.manual_seed(7)
        norm = nn.BatchNorm1d(8) if case.norm == "BatchNorm" else nn.LayerNorm(8)
        self.net = nn.Sequential(nn.Linear(4, 8), norm, nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
        self.case, self.records = case, records
        self.bad_updates = {**BAD_UPDATES, **({38: float("nan")} if case.guard else {})}
        self.window_step = -1
        self.window: list[int] = []
        self.random_state: Tensor | None = None
        self.loaded_random_states: list[Tensor] | None = None

    def configure_optimizers(self) -> Any:
        fused = self.case.number % 3 == 1
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1, fused=fused)
        optimizer.register_step_pre_hook(self.record_groups)
        return optimizer

    def record_groups(self, optimizer: Any, *_: Any) -> None:
        groups = [[repr(g["lr"]), g["weight_decay"], g["betas"]] for g in optimizer.param_groups]
        self.records.write("groups", self.trainer.global_step, groups)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        time.sleep(self.case.pause)
        if self.loaded_random_states is not None:
            torch.set_rng_state(self.loaded_random_states[self.global_rank])
            self.loaded_random_states = None
        step = self.trainer.global_step
        if step != self.window_step:
            self.window_step, self.window = step, []
            self.random_state = torch.get_rng_state()
        x, y, index = batch
        self.window += index.tolist()
        # The targets of Regression grow with the index.
        loss = nn.functional.mse_loss(self.net(x), y / (index + 1).unsqueeze(1))
        if self.case.module_logs:
            self.log("loss", loss)
        return loss * self.bad_updates.get(step, 1.0)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        time.sleep(self.case.pause)
        self.net(batch[0])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.records.write("samples", self.trainer.global_step, self.window)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        inside = self.trainer.global_step == self.window_step
        state = self.random_state if inside else torch.get_rng_state()
        states: list[Any] = [state]
        if self.trainer.world_size > 1:
            states = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(states, state)
        checkpoint["random_states"] = states
        checkpoint["inside_window"] = inside

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded_random_states = checkpoint["random_states"]


class SavesInsideWindows(L.Callback):
    """Saves a checkpoint after every few micro-batches, in and between accumulation windows.

    A loader with a position of its own does not repeat the window after a resume, so that its
    gradients are lost (docs/limits.md). With such a loader only ends of windows are saved.

    Args:
        folder: Folder of the checkpoints.
        every: Number of micro-batches between two checkpoints.
        inside: Whether to save inside windows, too.
    """

    def __init__(self, folder: Path, *, every: int, inside: bool) -> None:
        self.folder, self.every, self.inside = folder, every, inside

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        is_inside = trainer.global_step == module.window_step
        if batches % self.every == 0 and (self.inside or not is_inside):
            trainer.save_checkpoint(self.folder / f"batch={batches}.ckpt")


class SavesOnPreemption(ModelCheckpoint):
    """Saves after SIGTERM, too, which Lightning handles between two batches.

    A checkpoint after Ctrl-C may be written inside a batch. Lightning then numbers the logged steps
    of the resumed run from the next one on.
    """

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException):
            super().on_exception(trainer, module, exception)


class Marks(L.Callback):
    """Creates a file when the first batch starts, and one when training has ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.has_started = False

    def on_train_batch_start(self, *args: Any) -> None:
        if not self.has_started:
            self.has_started = True
            self.path.with_suffix(".started").touch()

    def on_train_end(self, *args: Any) -> None:
        self.path.with_suffix(".ended").touch()

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:
        traceback.print_exception(exception)


class RecordsSignals(L.Callback):
    """Records what the main thread does whenever SLURM's signal arrives."""

    def __init__(self, path: Path, name: str, run: int) -> None:
        self.records, self.number = Records(path, run), signal.Signals[name]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        handler = signal.getsignal(self.number)

        def record_and_handle(number: int, frame: Any) -> None:
            self.records.write("signal", trainer.global_step, place_of(frame))
            handler(number, frame)  # type: ignore[operator, misc]

        signal.signal(self.number, record_and_handle)


def place_of(frame: Any) -> str:
    """Returns what runs in a frame or its callers, of the innermost that is known."""
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        for part, name, place in PLACES:
            if part in file and name in ("", function):
                return place
        frame = frame.f_back
    return "other"


# What runs, by a part of the file and the function.
PLACES = (
    ("trainer/connectors/checkpoint", "", "saving a checkpoint"),
    ("lightning_bigopt/", "", "lightning_bigopt"),
    ("killed_training.py", "training_step", "forward pass"),
    ("torch/autograd", "", "backward pass"),
    ("killed_training.py", "record_groups", "optimizer step"),
    ("torch/optim/", "step", "optimizer step"),
    ("torch/optim/", "profile_hook_step", "optimizer step"),
    ("loops/evaluation_loop", "", "validation"),
    ("loops/training_epoch_loop", "", "elsewhere in a batch"),
    ("loops/fit_loop", "", "between epochs"),
)


def slurm_variables(folder: Path, case: Case, *, rank: int, port: int) -> dict[str, str]:
    """Returns the variables that SLURM sets, and a PATH with an ``scontrol`` that records calls."""
    program = folder / "bin" / "scontrol"
    program.parent.mkdir(exist_ok=True)
    if not program.exists():
        text = f'#!/bin/sh\necho "$@" >> {folder / "scontrol.txt"}\n'
        written = program.with_name(f"scontrol-{rank}")
        written.write_text(text)
        written.chmod(0o755)
        written.rename(program)
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": str(case.processes),
        "SLURM_NTASKS_PER_NODE": str(case.processes),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PATH": f"{program.parent}:{os.environ['PATH']}",
    }


def train(
    folder: str, case: Case, *, run: int, ckpt: str | None, rank: int = 0, port: int = 0
) -> None:
    """Trains to the end, from a checkpoint if there is one; may be killed at any moment.

    Writes into ``folder``: ``records-RANK.jsonl``, checkpoints, a TensorBoard log, ``final.ckpt``,
    and ``final-RANK.pt`` with weights, buffers and random state.

    Args:
        folder: Folder of the run, the same for all its processes.
        case: The configuration.
        run: Number of this part of the run.
        ckpt: Checkpoint to resume from; None to start.
        rank: Index of this process.
        port: Port of process 0, with several processes.
    """
    path = Path(folder)
    output = os.open(path / f"output-{run}-{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    faulthandler.register(signal.SIGUSR1)  # prints what each thread does
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    random.seed(rank)
    options = dict(QUIET)
    if case.requeue_signal:
        os.environ |= slurm_variables(path, case, rank=rank, port=port)
        # In the windows of a GlobalBatchLoader, which repeats them, and between those of others.
        every = 7 if case.repeats_windows else 6
        options |= {"val_check_interval": every, "check_val_every_n_epoch": None}
        options |= {"default_root_dir": path}
    if case.processes > 1:
        options |= {"devices": case.processes, "strategy": "ddp"}
    if case.processes > 1 and not case.requeue_signal:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(case.processes),
            "LOCAL_WORLD_SIZE": str(case.processes),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",
        }
    records = Records(path / f"records-{rank}.jsonl", run)
    module = KilledModule(case, records)
    callbacks = case.callbacks()
    callbacks[-1].records = records
    if case.loader == "stateful" and not case.has_ramp:
        options["accumulate_grad_batches"] = 3
    checkpoints = SavesOnPreemption(
        path / "checkpoints",
        filename="{step}",
        every_n_train_steps=3,
        save_top_k=-1,
        save_on_exception=case.processes == 1,
        enable_version_counter=False,
    )
    callbacks += [
        SavesInsideWindows(path / "checkpoints", every=5, inside=case.repeats_windows),
        checkpoints,
        Marks(path / f"run-{run}-{rank}"),
    ]
    precision = case.precision_options()
    validation = None
    if case.requeue_signal:
        callbacks.append(RecordsSignals(path / "signals.jsonl", case.requeue_signal, run))
        requeue_signal = signal.Signals[case.requeue_signal]
        environment = SLURMEnvironment(requeue_signal=requeue_signal)
        precision["plugins"] = [*precision.get("plugins", ()), environment]
        # Without a generator of its own, a DataLoader draws from that of the training.
        own = torch.Generator()
        validation = DataLoader(Regression(12), batch_size=4, generator=own)
    torch.manual_seed(100 + rank)
    trainer = L.Trainer(
        **{
            **options,
            **case.limit(),
            **precision,
            "callbacks": callbacks,
            "logger": TensorBoardLogger(path, name="", version="log"),
            "log_every_n_steps": 1,
            "enable_checkpointing": True,
        }
    )
    is_resumed = bool(ckpt or case.requeue_signal)  # Lightning finds the checkpoint of a signal
    resume = {"ckpt_path": ckpt, "weights_only": True if is_resumed else None}
    trainer.fit(module, case.data(), validation, **resume)
    trainer.save_checkpoint(path / "final.ckpt")
    final = {"module": module.state_dict(), "random": torch.get_rng_state()}
    torch.save(final, path / f"final-{rank}.pt")
