"""Folders that cannot be written: an error at fit start, and a warning during the training."""

from __future__ import annotations

import errno
import math
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy

from lightning_bigopt import (
    BatchSizeScheduler,
    ConstantBatchSize,
    LearningRateScheduler,
    Linear,
    OptimizationMonitor,
    StepGuard,
    replay,
)
from lightning_bigopt.cli.schedules import draw
from lightning_bigopt.reporting.report import write_report
from lightning_bigopt.reporting.runs import read_run
from lightning_bigopt.tuning import plan
from tests.bad_batches import BadBatchModule, fit
from tests.helpers import QUIET, Probe, loader

BAD = {4: math.nan, 7: math.nan, 9: math.nan}


def is_a_file(folder: Path) -> Path:
    (folder / "out").touch()
    return folder / "out"


def is_below_a_file(folder: Path) -> Path:
    return is_a_file(folder) / "a" / "b"


def is_a_broken_link(folder: Path) -> Path:
    (folder / "out").symlink_to(folder / "missing" / "folder")
    return folder / "out"


def has_too_long_a_name(folder: Path) -> Path:
    return folder / ("x" * 300)


def is_in_proc(folder: Path) -> Path:
    return Path("/proc/out")


UNWRITABLE = [
    (is_a_file, r"'.*out', which is a file; "),
    (is_below_a_file, r"'.*out.a.b', which is below a file; "),
    (is_a_broken_link, r"'.*out', which is a link to nothing; "),
    (has_too_long_a_name, r"'.*xxx', which cannot be used \(File name too long\); "),
    (is_in_proc, r"'/proc/out', to which nothing can be written \(.*\); "),
]


@pytest.fixture(params=UNWRITABLE, ids=lambda case: case[0].__name__)
def unwritable(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A folder that cannot be written to, and the end of the message."""
    make, message = request.param
    return make(tmp_path), message


def test_folder_for_batches_is_checked_at_fit_start(unwritable: tuple[Path, str]) -> None:
    folder, message = unwritable
    module = BadBatchModule(BAD)
    expected = "^forensics must be a folder that can be written to, got " + message + "choose "
    with pytest.raises(ValueError, match=expected):
        fit(module, StepGuard(forensics=str(folder)))
    assert not module.lrs


def test_file_for_the_report_is_checked_at_fit_start(
    unwritable: tuple[Path, str], tmp_path: Path
) -> None:
    folder, message = unwritable
    monitor = OptimizationMonitor(report=str(folder / "report.html"))
    with pytest.raises(ValueError, match="^report must be a file in .* in " + message + "choose"):
        fit(Probe(), monitor, logger=CSVLogger(tmp_path / "logs"))


def test_files_of_reports_and_pictures_are_checked_before_they_are_made(
    unwritable: tuple[Path, str], tmp_path: Path
) -> None:
    folder, message = unwritable
    logger = CSVLogger(tmp_path / "logs")
    fit(Probe(), OptimizationMonitor(every=1), logger=logger)
    scheduler = LearningRateScheduler(Linear())
    trainer = L.Trainer(**QUIET | {"callbacks": [scheduler], "max_steps": 4})
    planned = plan(trainer, Probe(), loader(16, 2))
    for name, write in (
        ("output", lambda: write_report(logger.log_dir, folder / "report.html")),
        ("path", lambda: planned.picture(folder / "plan.png")),
        ("picture", lambda: draw([Linear()], 100, str(folder / "schedules.png"))),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be a file in .* in {message}choose"):
            write()


@pytest.mark.parametrize("path", ["", 5, b"rejected", ["rejected"]])
def test_path_that_is_none_raises(path: Any) -> None:
    for name, make in (
        ("forensics", lambda: StepGuard(forensics=path)),
        ("report", lambda: OptimizationMonitor(report=path)),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be a path or None, got "):
            make()


def test_check_creates_nothing(tmp_path: Path) -> None:
    guard = StepGuard(forensics=str(tmp_path / "new" / "folder"))
    fit(BadBatchModule({}), guard)
    trainer = L.Trainer(
        **QUIET | {"callbacks": [guard, LearningRateScheduler(Linear())], "max_steps": 4},
        devices=2,
        strategy=DDPStrategy(),
    )
    plan(trainer, Probe(), loader(16, 2))
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------- during the training


def deletes_the_folder(folder: Path, patch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(folder)


def puts_a_file_in_its_place(folder: Path, patch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(folder)
    folder.touch()


def fills_the_disk(folder: Path, patch: pytest.MonkeyPatch) -> None:
    save = torch.save

    def save_half(contents: Any, path: Path, **options: Any) -> None:
        save(contents, path, **options)
        path.write_bytes(path.read_bytes()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(torch, "save", save_half)


class At(L.Callback):
    """Calls a function before one update."""

    def __init__(self, step: int, function: Callable[[], None]) -> None:
        self.step, self.function = step, function

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.function()


def trained(*callbacks: Any, **options: Any) -> list[torch.Tensor]:
    module = BadBatchModule(BAD, lr=0.01)
    fit(module, *callbacks, **options)
    return [parameter.detach().clone() for parameter in module.parameters()]


@pytest.mark.parametrize("fault", [puts_a_file_in_its_place, fills_the_disk])
def test_batches_that_cannot_be_written_give_one_warning(
    fault: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trained(StepGuard())
    folder = tmp_path / "rejected"
    guard = StepGuard(forensics=str(folder))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = trained(At(6, lambda: fault(folder, monkeypatch)), guard)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    named = [update.file is not None for update in guard.rejections]
    assert named == [True, False, False]
    written = [str(w.message) for w in caught if "could not be written" in str(w.message)]
    assert len(written) == 1
    assert "update-00000007-rank0.pt" in written[0]
    if fault is fills_the_disk:  # nothing is left of the files that were not written
        assert [path.name for path in folder.iterdir()] == ["update-00000004-rank0.pt"]


def test_deleted_folder_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "rejected"
    guard = StepGuard(forensics=str(folder))
    module = BadBatchModule(BAD)
    fit(module, At(6, lambda: deletes_the_folder(folder, monkeypatch)), guard)
    assert [update.file is not None for update in guard.rejections] == [True] * 3
    assert len(list(folder.iterdir())) == 2
    assert replay(guard.rejections[-1].file, module).losses


class Unpicklable(BadBatchModule):
    """Has a lock in every batch."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [*batch, threading.Lock()]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch[:3], batch_idx)


def test_batch_that_cannot_be_saved_gives_a_warning(tmp_path: Path) -> None:
    guard = StepGuard(forensics=str(tmp_path))
    with pytest.warns(UserWarning, match="batches of a rejected update could not be written"):
        fit(Unpicklable(BAD), guard)
    assert [update.file for update in guard.rejections] == [None] * 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_logger_that_cannot_write_does_not_end_the_training(
    kind: type[Logger], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Disk full from update 4 on; the logger's own end is Lightning's and still works here."""
    logger, healthy = kind(tmp_path), CSVLogger(tmp_path / "healthy")  # type: ignore[call-arg]
    error = OSError(errno.ENOSPC, "No space left on device")

    def fail(*args: Any, **options: Any) -> None:
        raise error

    def fills_disk() -> None:
        if isinstance(logger, TensorBoardLogger):
            files = logger.experiment._get_file_writer()
            monkeypatch.setattr(files, "add_event", fail)
            monkeypatch.setattr(files, "add_summary", fail)
        else:
            monkeypatch.setattr(logger.experiment, "save", fail)

    def frees_disk() -> None:
        monkeypatch.undo()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(
            At(4, fills_disk),
            At(11, frees_disk),
            StepGuard(),
            OptimizationMonitor(every=1, histograms_every=1),
            logger=[logger, healthy],
        )
    written = [str(w.message) for w in caught if "could not write" in str(w.message)]
    assert len(written) == 1
    assert written[0].startswith(f"{kind.__name__} could not write (OSError: [Errno 28] ")
    steps = [step for step, _ in read_run(healthy.log_dir).curves["grad_norm/total"]]
    assert steps == list(range(16))
    assert {12, 15} <= {step for step, _ in read_run(logger.log_dir).curves["grad_norm/total"]}


def test_metrics_without_a_monitor_do_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = CSVLogger(tmp_path)

    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fills_disk() -> None:
        monkeypatch.setattr(logger.experiment, "save", fail)

    with pytest.warns(UserWarning, match="CSVLogger could not write"):
        trainer = fit(
            Probe(),
            At(2, fills_disk),
            At(5, monkeypatch.undo),
            BatchSizeScheduler(ConstantBatchSize(4)),
            logger=logger,
            log_every_n_steps=1,
        )
    assert trainer.global_step == 8
