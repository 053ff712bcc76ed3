"""Folders that become full, read-only or are deleted while a run writes to them."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import math
import os
import resource
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_bigopt import (
    AutoClip,
    BatchSizeScheduler,
    BatchSizeSteps,
    GradientClipping,
    LearningRateScheduler,
    NonFinite,
    NormSpike,
    OptimizationMonitor,
    StepGuard,
    WarmupCosine,
)
from tests.faults.forked import Outcome, Recording, described, run_forked
from tests.helpers import ResumableLoader

AT = 5  # the number of updates before the fault
UPDATES = 12
FULL_DISK = "full (tmpfs)"


# ----------------------------------------------------------------------------------------- faults


def limit_file_size(folder: Path) -> None:
    """Lets every write beyond 1 KiB fail, as on a full disk; needs no privileges."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))


def replace_by_file(folder: Path) -> None:
    """Moves the folder away, and puts a file in its place."""
    folder.rename(f"{folder}-away")
    folder.write_text("a file")


def delete(folder: Path) -> None:
    shutil.rmtree(folder)


def fill(folder: Path) -> None:
    """Fills the file system of the folder."""
    free = os.statvfs(folder)
    (folder / "filler").write_bytes(b"x" * (free.f_bavail * free.f_frsize))


def make_read_only(folder: Path) -> None:
    """Remounts the file system of the folder."""
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


FAULTS: dict[str, Callable[[Path], None]] = {
    "full (limit of the file size)": limit_file_size,
    "a file in its place": replace_by_file,
    "deleted": delete,
    FULL_DISK: fill,
    "read-only (tmpfs)": make_read_only,
}
MOUNTED = {FULL_DISK, "read-only (tmpfs)"}


def mount(folder: Path) -> None:
    """Mounts a file system of 2 MiB that only this process sees; needs privileges."""
    if ctypes.CDLL(None, use_errno=True).unshare(0x00020000):  # CLONE_NEWNS
        raise PermissionError(ctypes.get_errno(), "unshare")
    for options in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", "size=2m", "x", str(folder)]):
        subprocess.run(["mount", *options], check=True)


# -------------------------------------------------------------------------------------------- runs

# What writes to the folder, and whether a run without the callbacks of this package does.
WRITERS = {
    "ModelCheckpoint": True,
    "ModelCheckpoint(save_last=True)": True,
    "ModelCheckpoint, one file": True,
    "TensorBoardLogger": True,
    "CSVLogger": True,
    "OptimizationMonitor(report=)": False,
    "StepGuard(forensics=)": False,
    "default_root_dir": True,
}
OS_ERRORS = {"OSError", "FileExistsError", "FileNotFoundError", "NotADirectoryError"}
# torch's writer of files raises it, for a full disk as for any other error.
TORCH_ERROR = "RuntimeError"
# Lightning moves a checkpoint from the folder for temporary files. On a full disk a part remains.
PARTIAL = "step=6.ckpt"

TEXT = f"""\
A folder fails after {AT} of {UPDATES} updates. On "tmpfs" it is a file system of 2 MiB that is
filled or remounted read-only. A limit of the file size needs no privileges: every write beyond
1 KiB fails, in every file of the process. The rows of `report=` and `forensics=` then end with the
error of the logger, whose file is in another folder.

The runs have LearningRateScheduler, StepGuard, GradientClipping, BatchSizeScheduler and, where it
can write, OptimizationMonitor; those without callbacks have none of them. A run that finishes has
the weights and learning rates of a run without the fault, to the bit. The last column counts the
checkpoints from which a run resumes to the same weights and learning rates, to the bit.

Each run with callbacks is repeated with a module that raises an error after the fault. After any
error, nothing of this package remains on the strategy, the optimizers and the callbacks.

- Checkpoints of earlier updates are intact. On a full disk Lightning itself leaves a part of the
  checkpoint that it could not write, if the folder for temporary files is on another disk.
- A logger that cannot write ends the run, with and without callbacks, at the latest when Lightning
  closes it.
- If a callback catches the error of `trainer.save_checkpoint`, the training does not change:
  {{equal}} of {{runs}} runs with {{saves}} failed saves in five hooks, before and after the
  callbacks, end with the same weights, learning rates and states, to the bit.

Unexpected: {{problems}}

| writes to the folder | fault | without callbacks | with callbacks | checkpoints that resume |
|---|---|---|---|---|
{{rows}}
"""


class Model(L.LightningModule):
    """A small network, of which one batch may be bad."""

    def __init__(self, *, bad: bool = False) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
        self.bad, self.raises = bad, False
        self.lrs: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.raises and self.trainer.global_step == AT + 2:
            raise LookupError("the module's own error")
        loss = torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss * math.nan if self.bad and self.trainer.global_step == AT + 1 else loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        optimizer.register_step_pre_hook(
            lambda used, *_: self.lrs.append(used.param_groups[0]["lr"])
        )
        return optimizer

    def digest(self) -> str:
        """Returns a digest of weights and learning rates."""
        parts = [p.detach().numpy().tobytes() for p in self.parameters()]
        return hashlib.sha1(b"".join(parts) + repr(self.lrs).encode()).hexdigest()[:12]


class Breaks(L.Callback):
    """Lets the fault happen after ``AT`` updates."""

    def __init__(self, fault: Callable[[], None]) -> None:
        self._fault = fault

    def on_train_batch_start(self, trainer: L.Trainer, *arguments: Any) -> None:
        if trainer.global_step == AT:
            self._fault()
            self._fault = lambda: None


def callbacks(writer: str, folder: Path) -> list[L.Callback]:
    """Returns the callbacks of this package."""
    made = [
        LearningRateScheduler(WarmupCosine(warmup=3)),
        StepGuard(
            [NonFinite(), NormSpike(armed=3)],
            forensics=str(folder) if writer == "StepGuard(forensics=)" else None,
        ),
        GradientClipping(AutoClip(percentile=50)),
        BatchSizeScheduler(BatchSizeSteps({"0%": 2, "50%": 4})),
    ]
    if not writer.startswith(("ModelCheckpoint", "StepGuard")):
        report = folder / "report.html" if writer == "OptimizationMonitor(report=)" else None
        made.append(OptimizationMonitor(every=1, report=report and str(report)))
    return made


def options(writer: str, folder: Path) -> dict[str, Any]:
    """Returns the arguments of the Trainer with which a writer writes to the folder."""
    found: dict[str, Any] = {"logger": False, "default_root_dir": folder.parent / "root"}
    if writer == "ModelCheckpoint, one file":
        found["callbacks"] = [
            ModelCheckpoint(
                folder, filename="only", every_n_train_steps=2, enable_version_counter=False
            )
        ]
    elif writer.startswith("ModelCheckpoint"):
        found["callbacks"] = [
            ModelCheckpoint(
                folder,
                filename="{step}",
                every_n_train_steps=2,
                save_top_k=-1,
                save_last="last" in writer,
            )
        ]
    elif writer == "TensorBoardLogger":
        found["logger"] = TensorBoardLogger(folder, flush_secs=0, max_queue=1)
    elif writer == "CSVLogger":
        found["logger"] = CSVLogger(folder, flush_logs_every_n_steps=1)
    elif writer == "OptimizationMonitor(report=)":
        found["logger"] = CSVLogger(folder.parent / "logs")
    elif writer == "default_root_dir":
        del found["logger"]
        found["default_root_dir"] = folder
    return found


def make_trainer(given: dict[str, Any], *added: L.Callback) -> L.Trainer:
    """Returns a Trainer on the CPU with more callbacks."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    listed = [*added, *given.get("callbacks", ())]
    return L.Trainer(
        **{**quiet, **given, "accelerator": "cpu", "max_steps": UPDATES, "callbacks": listed}
    )


def fit(model: Model, trainer: L.Trainer, ckpt: Any = None) -> None:
    """Trains on batches that are the same in every run."""
    trainer.fit(model, ResumableLoader(24, 2), ckpt_path=ckpt, weights_only=True if ckpt else None)


CALM = {"logger": False, "enable_checkpointing": False}


def train(case: tuple[str, str, bool, bool], rank: int, out: Path, recording: Recording) -> None:
    """Trains without the fault, with it, and from every checkpoint that it has left."""
    writer, fault, with_callbacks, raises = case
    torch.set_num_threads(1)
    folder = out / "folder"
    folder.mkdir()
    if fault in MOUNTED:
        mount(folder)
    bad = writer == "StepGuard(forensics=)"
    ours = callbacks(writer, out / "elsewhere") if with_callbacks else []
    whole = Model(bad=bad)
    fit(whole, make_trainer(CALM, *[c for c in ours if not isinstance(c, OptimizationMonitor)]))

    model = Model(bad=bad)
    model.raises = raises
    ours = callbacks(writer, folder) if with_callbacks else []
    breaks = Breaks(lambda: FAULTS[fault](folder))
    trainer = make_trainer(options(writer, folder), breaks, *ours)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    errors: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit(model, trainer)
        except Exception as error:  # noqa: BLE001  # recorded, whatever it is
            errors = chain(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    recording.add(
        run=errors[0] if errors else "finished",
        hidden=errors[1:],
        left=left_behind(trainer),
        is_undisturbed=model.digest() == whole.digest(),
        warned=[str(w.message) for w in caught if "could not be" in str(w.message)],
    )
    away = Path(f"{folder}-away")
    for path in sorted((away if away.exists() else folder).rglob("*.ckpt")):
        is_partial = fault == FULL_DISK and path.name == PARTIAL
        recording.add(**resumed(path, whole, with_callbacks), is_partial=is_partial)


def chain(error: BaseException | None) -> list[str]:
    """Returns an error, and those that it has replaced."""
    found: list[BaseException] = []
    while error is not None and error not in found:  # TensorBoard raises the same error again
        found.append(error)
        error = error.__cause__ or error.__context__
    return [described(one) for one in found]


def left_behind(trainer: L.Trainer) -> list[str]:
    """Returns what a fit that has ended has left on the objects of the Trainer."""
    found = [name for name in vars(trainer.strategy) if name == "lightning_module_state_dict"]
    for optimizer in trainer.optimizers:
        found += [name for name in vars(optimizer) if name in ("step", "_bigopt_step_control")]
    for callback in trainer.callbacks:
        if getattr(callback, "fit", None) is not None or vars(callback).get("_fit") is not None:
            found.append(f"fit of {type(callback).__name__}")
    return found


def resumed(path: Path, whole: Model, with_callbacks: bool) -> dict[str, Any]:
    """Resumes from a checkpoint, and compares with the run that nothing disturbed."""
    model, ours = Model(), callbacks("ModelCheckpoint", path) if with_callbacks else []
    try:
        step = torch.load(path, weights_only=True)["global_step"]
        fit(model, make_trainer(CALM, *ours), ckpt=path)
    except Exception as error:  # noqa: BLE001  # recorded, whatever it is
        return {"checkpoint": path.name, "resumes": described(error)}
    model.lrs = whole.lrs[:step] + model.lrs
    is_equal = model.digest() == whole.digest()
    return {"checkpoint": path.name, "step": step, "resumes": "equal" if is_equal else "differs"}


def run_case(
    writer: str, fault: str, *, with_callbacks: bool = True, raises: bool = False
) -> Outcome:
    """Runs a case in a process of its own.

    Args:
        writer: What writes to the folder.
        fault: What happens to the folder.
        with_callbacks: Whether the run has the callbacks of this package.
        raises: Whether the module raises an error of its own after the fault.
    """
    case = (writer, fault, with_callbacks, raises)
    (outcome,) = run_forked(train, case, processes=1, bound=120)
    return outcome


def end_of(outcome: Outcome) -> str:
    """Returns how the run with the fault ended, without the message of the error."""
    return outcome.records[0]["run"].partition(":")[0] if outcome.records else outcome.end


def problems(outcome: Outcome, *, raises: bool = False) -> list[str]:
    """Returns what must not happen."""
    if outcome.end != "finished":
        return [outcome.end]
    run, *checkpoints = outcome.records
    found = [f"leaves {name}" for name in run["left"]]
    allowed = OS_ERRORS | {TORCH_ERROR} | ({"LookupError"} if raises else {"finished"})
    if end_of(outcome) not in allowed:
        found.append(f"ends with {run['run']}")
    if run["run"] == "finished" and not run["is_undisturbed"]:
        found.append("trains differently")
    found += [
        f"{saved['checkpoint']} {saved['resumes']}"
        for saved in checkpoints
        if saved["resumes"] != "equal" and not saved["is_partial"]
    ]
    return found


# ------------------------------------------------------------------ saves whose error is caught

HOOKS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_epoch_end",
)


class SavesInVain(L.Callback):
    """Saves to a folder that does not exist, and goes on."""

    def __init__(self, hook: str, path: Path) -> None:
        self.failed = 0

        def save(trainer: L.Trainer, *arguments: Any) -> None:
            try:
                trainer.save_checkpoint(path)
            except OSError:
                self.failed += 1

        setattr(self, hook, save)


def saves_in_vain(hook: str, folder: Path, *, first: bool) -> tuple[bool, int]:
    """Trains with saves that fail, and without them.

    Args:
        hook: The hook that saves.
        folder: A folder.
        first: Whether the callback that saves is the first one, instead of the last.

    Returns:
        Whether weights, learning rates and the final checkpoints are equal to the bit, and the
        number of saves that failed.
    """
    blocked = folder / f"{hook}-{first}"
    blocked.write_text("a file")
    vain = SavesInVain(hook, blocked / "any.ckpt")
    results = []
    for saving in (None, vain):
        model, ours = Model(bad=True), callbacks("ModelCheckpoint", folder)
        listed = ours if saving is None else [saving, *ours] if first else [*ours, saving]
        trainer = make_trainer({**CALM, "default_root_dir": folder}, *listed)
        fit(model, trainer)
        path = folder / "final.ckpt"
        trainer.save_checkpoint(path)
        results.append((model.digest(), _states(torch.load(path, weights_only=True))))
    return results[0] == results[1], vain.failed


def _states(checkpoint: dict[str, Any]) -> str:
    """Returns a text of the states of callbacks, loops and schedulers in a checkpoint."""
    names = ("callbacks", "loops", "lr_schedulers", "global_step")
    return repr([checkpoint[name] for name in names])


# ----------------------------------------------------------------------------------------- report


def measure() -> str:
    """Runs every case with and without the callbacks."""
    rows, found = [], []
    for (writer, of_module), fault in itertools.product(WRITERS.items(), FAULTS):
        ours = run_case(writer, fault)
        bare = end_of(run_case(writer, fault, with_callbacks=False)) if of_module else "has none"
        raising = run_case(writer, fault, raises=True)
        for outcome, raises in ((ours, False), (raising, True)):
            found += [f"{writer}, {fault}: {p}" for p in problems(outcome, raises=raises)]
        saved = [record for record in ours.records[1:] if not record["is_partial"]]
        equal = sum(record["resumes"] == "equal" for record in saved)
        cells = (writer, fault, bare, end_of(ours), f"{equal} of {len(saved)}" if saved else "none")
        rows.append(f"| {' | '.join(cells)} |")
    with tempfile.TemporaryDirectory() as folder:
        vain = [
            saves_in_vain(hook, Path(folder), first=first)
            for hook, first in itertools.product(HOOKS, (True, False))
        ]
    return TEXT.format(
        problems="\n".join(f"- {problem}" for problem in found) or "none.",
        saves=sum(failed for _, failed in vain),
        equal=sum(equal for equal, _ in vain),
        runs=len(vain),
        rows="\n".join(rows),
    )
