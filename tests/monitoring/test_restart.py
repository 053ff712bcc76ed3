"""A killed run that is started again in its TensorBoard folder: every point stands there once."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as PluginEventAccumulator,
)
from torch.utils.tensorboard import SummaryWriter

from lightning_bigopt import (
    Cosine,
    LearningRateScheduler,
    NonFinite,
    OptimizationMonitor,
    StepGuard,
)
from lightning_bigopt.reporting.runs import read_run
from tests.helpers import QUIET, ResumableLoader, fit
from tests.monitoring.helpers import MEASURED_TIMES, Blocks, batch_tokens, rows_of

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
UPDATES, KILLED_AT, SAVED_AT = 12, 7, 4
EVERY_STEP = list(range(UPDATES))


class LogsText(Blocks):
    """Logs as users do: metrics, hyperparameters, and a scalar on the writer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"width": 6})

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for logger in self.loggers:
            logger.experiment.add_scalar("mine", 1.0, self.global_step)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_step == 2 else loss


def train(logger: Any, *callbacks: Any, axis: Any = "updates", **options: Any) -> L.Trainer:
    return fit(
        LogsText(),
        ResumableLoader(96, 8),
        *callbacks,
        LearningRateScheduler(Cosine()),
        StepGuard([NonFinite()]),
        OptimizationMonitor(every=1, x_axis=axis, tokens=batch_tokens, histograms_every=1),
        **{"max_steps": UPDATES, "logger": logger, "log_every_n_steps": 1, **options},
    )


class KillsProcess(L.Callback):
    """Ends the process by signal 9, when its events are written."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == KILLED_AT:
            for logger in trainer.loggers:
                logger.save()
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(folder: Path) -> None:
    """Trains with three loggers, and saves a checkpoint."""
    loggers = [logger_of(folder), logger_of(folder, "other")]
    loggers.append(logger_of(folder, "bare", default_hp_metric=False))
    save = ModelCheckpoint(folder / "saved", every_n_train_steps=SAVED_AT, save_top_k=-1)
    train(loggers, save, KillsProcess(), enable_checkpointing=True)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed by signal 9 in a process of its own."""
    folder = tmp_path_factory.mktemp("killed")
    script = f"""
        from pathlib import Path
        from tests.monitoring.test_restart import train_until_killed
        train_until_killed(Path({str(folder)!r}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    steps = scalars(folder / "killed")
    assert [step for step, _ in steps["optim/lr"]] == EVERY_STEP[:KILLED_AT]
    return folder


@pytest.fixture
def folder(killed: Path, tmp_path: Path) -> Path:
    """A copy of the folder of the killed run."""
    wait_for_next_second()
    return Path(shutil.copytree(killed, tmp_path / "copy"))


def wait_for_next_second() -> None:
    """The names of event files sort them by the second in which they were created."""
    time.sleep(1 - time.time() % 1)


def logger_of(folder: Path, version: str = "killed", **options: Any) -> TensorBoardLogger:
    return TensorBoardLogger(folder, name="", version=version, **options)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Reads all scalars with TensorBoard's own reader."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def tensors(folder: Path) -> dict[str, list[int]]:
    """Reads the steps of all texts and histograms with the reader of TensorBoard's pages."""
    events = PluginEventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    return {tag: [e.step for e in events.Tensors(tag)] for tag in events.Tags()["tensors"]}


def without_times(curves: Mapping[str, Any]) -> dict[str, str]:
    """Returns the curves as text, in which NaN equals NaN; of measured times only the steps."""
    return {
        tag: repr([step for step, _ in curve] if tag.startswith(MEASURED_TIMES) else curve)
        for tag, curve in curves.items()
    }


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    logger = logger_of(tmp_path_factory.mktemp("straight"))
    train(logger)
    return Path(logger.log_dir)


# Written again by every start: by Lightning, and the text and the dashboard of the monitor.
OF_EACH_START = ("hp_metric", "_hparams_/", "plan/text_summary", "custom_scalars__config__")


def check_equals(folder: Path, straight: Path, *, without: tuple[str, ...] = ()) -> None:
    """Checks that all readers find the same values in the folder as in an uninterrupted run's."""

    def compared(tags: Mapping[str, Any]) -> dict[str, Any]:
        return {tag: seen for tag, seen in tags.items() if not tag.startswith(without or "\n")}

    found, expected = compared(scalars(folder)), compared(scalars(straight))
    assert [step for step, _ in found["optim/lr"]] == EVERY_STEP
    assert [step for step, _ in found["mine"]] == EVERY_STEP
    assert without_times(found) == without_times(expected)
    assert compared(tensors(folder)) == compared(tensors(straight))
    ours, right = read_run(folder), read_run(straight)
    assert without_times(ours.curves) == without_times(right.curves)
    assert len(right.refusals) == 1
    assert ours.refusals == right.refusals
    assert ours.texts == right.texts


def test_run_killed_before_its_first_checkpoint_is_logged_once(
    folder: Path, straight: Path
) -> None:
    train(logger_of(folder))
    check_equals(folder / "killed", straight)


def test_run_that_is_started_three_times_is_logged_once(folder: Path, straight: Path) -> None:
    train(logger_of(folder), max_steps=3)
    wait_for_next_second()
    train(logger_of(folder))
    check_equals(folder / "killed", straight)


def test_resumed_run_is_logged_once(folder: Path, straight: Path) -> None:
    saved = folder / "saved" / f"epoch=0-step={SAVED_AT}.ckpt"
    train(logger_of(folder), ckpt_path=saved)
    check_equals(folder / "killed", straight, without=OF_EACH_START)


def test_every_logger_is_continued_in_its_folder(folder: Path, straight: Path) -> None:
    train([logger_of(folder), logger_of(folder, "new"), logger_of(folder, "other")])
    for version in ("killed", "new", "other"):
        check_equals(folder / version, straight)


@pytest.mark.parametrize("axis", ["samples", "tokens"])
def test_every_axis_starts_again(axis: str, folder: Path) -> None:
    train(logger_of(folder), axis=axis)
    found = scalars(folder / "killed")
    each = 8 if axis == "samples" else 80
    assert [step for step, _ in found["optim/lr"]] == [each * (i + 1) for i in range(UPDATES)]
    assert [step for step, _ in found["train_loss"]] == EVERY_STEP


def test_values_logged_before_the_fit_are_kept(folder: Path) -> None:
    logger = logger_of(folder)
    logger.experiment.add_text("config", "width 6")
    logger.experiment.add_scalar("data/size", 96.0, 0)
    logger.log_hyperparams({"width": 6})
    train(logger)
    assert tensors(folder / "killed")["config/text_summary"] == [0]
    assert read_run(folder / "killed").texts["config"] == "width 6"
    assert scalars(folder / "killed")["data/size"] == [(0, 96.0)]
    assert [step for step, _ in scalars(folder / "killed")["train_loss"]] == EVERY_STEP


class Validates(LogsText):
    """Logs a metric of its validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", 1.0)


def test_values_of_a_validation_before_the_fit_are_kept(folder: Path) -> None:
    logger = logger_of(folder)
    trainer = L.Trainer(**QUIET | {"logger": logger, "max_steps": 2, "limit_val_batches": 1})
    trainer.validate(Validates(), ResumableLoader(96, 8))
    before = scalars(folder / "killed")["val_loss"]
    train(logger)
    assert scalars(folder / "killed")["val_loss"] == before == [(0, 1.0)]
    assert [step for step, _ in scalars(folder / "killed")["train_loss"]] == EVERY_STEP


def test_second_fit_of_a_trainer_keeps_all_values_of_the_first(tmp_path: Path) -> None:
    logger = logger_of(tmp_path)
    trainer = train(logger, max_steps=4)
    logger.experiment.add_scalar("my axis", 1.0, 1000)
    trainer.fit_loop.epoch_loop.max_steps = UPDATES
    trainer.fit(LogsText(), ResumableLoader(96, 8))
    found = scalars(tmp_path / "killed")
    assert found["my axis"] == [(1000, 1.0)]
    for tag in ("optim/lr", "train_loss", "mine"):
        assert [step for step, _ in found[tag]] == EVERY_STEP, tag


def test_second_trainer_with_the_same_logger_keeps_the_values_of_the_first(tmp_path: Path) -> None:
    logger = logger_of(tmp_path)
    train(logger, max_steps=4)
    logger.experiment.add_scalar("first stage", 1.0, 3)
    wait_for_next_second()
    train(logger, max_steps=4)
    found = scalars(tmp_path / "killed")
    assert found["first stage"] == [(3, 1.0)]
    assert [step for step, _ in found["optim/lr"]] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_second_start_in_the_same_process_is_logged_once(tmp_path: Path, straight: Path) -> None:
    train(logger_of(tmp_path), max_steps=5)
    wait_for_next_second()
    train(logger_of(tmp_path))
    check_equals(tmp_path / "killed", straight)


def test_trial_run_leaves_the_folder_unchanged(folder: Path) -> None:
    before = scalars(folder / "killed")
    train(logger_of(folder), fast_dev_run=True)
    assert without_times(scalars(folder / "killed")) == without_times(before)


def test_values_of_a_validation_in_another_process_are_kept(tmp_path: Path) -> None:
    """Lightning logs ``epoch`` with the metrics of an evaluation, too."""
    trainer = L.Trainer(**QUIET | {"logger": logger_of(tmp_path), "limit_val_batches": 1})
    trainer.validate(Validates(), ResumableLoader(96, 8))
    (events,) = (tmp_path / "killed").glob("events*")
    events.rename(str(events).replace(f".{os.getpid()}.", ".1."))
    before = scalars(tmp_path / "killed")["val_loss"]
    wait_for_next_second()
    train(logger_of(tmp_path), max_steps=3)
    assert scalars(tmp_path / "killed")["val_loss"] == before == [(0, 1.0)]


def test_events_of_another_program_are_kept(tmp_path: Path, straight: Path) -> None:
    with SummaryWriter(str(tmp_path / "killed")) as writer:
        for step in range(20):
            writer.add_scalar("data/length", float(step), step)
            writer.add_text("data/name", "text", step)
    with SummaryWriter(str(tmp_path / "killed")) as writer:
        writer.add_scalar("teacher-epoch", 0.0, 0)  # another logger, with a prefix
    wait_for_next_second()
    train(logger_of(tmp_path))
    found = scalars(tmp_path / "killed")
    assert found.pop("data/length") == [(step, float(step)) for step in range(20)]
    assert found.pop("teacher-epoch") == [(0, 0.0)]
    assert without_times(found) == without_times(scalars(straight))
    assert tensors(tmp_path / "killed")["data/name/text_summary"] == list(range(20))


def test_training_without_the_monitor_is_continued_too(tmp_path: Path, straight: Path) -> None:
    fit(
        LogsText(),
        ResumableLoader(96, 8),
        max_steps=3,
        logger=logger_of(tmp_path),
        log_every_n_steps=1,
    )
    (events,) = (tmp_path / "killed").glob("events*")
    events.rename(str(events).replace(f".{os.getpid()}.", ".1."))  # as of another process
    wait_for_next_second()
    train(logger_of(tmp_path))
    check_equals(tmp_path / "killed", straight)


@pytest.mark.parametrize("prefix", ["trial", "a+b"])
def test_prefix_of_the_logger_is_followed(prefix: str, tmp_path: Path) -> None:
    train(logger_of(tmp_path, prefix=prefix), max_steps=3)
    wait_for_next_second()
    train(logger_of(tmp_path, prefix=prefix))
    found = scalars(tmp_path / "killed")
    assert [step for step, _ in found[f"{prefix}-train_loss"]] == EVERY_STEP


def test_run_in_a_folder_with_unreadable_events_warns(tmp_path: Path) -> None:
    (tmp_path / "killed" / "events.out.tfevents.1.folder").mkdir(parents=True)
    (tmp_path / "killed" / "events.out.tfevents.2.text").write_text("no events" * 99)
    (tmp_path / "killed" / "events.out.tfevents.3.link").symlink_to(tmp_path / "gone")
    with (
        pytest.warns(UserWarning, match=r"tfevents\.1\.folder' could not be read"),
        pytest.warns(UserWarning, match=r"tfevents\.3\.link' could not be read"),
    ):
        train(logger_of(tmp_path), max_steps=3)


def test_row_of_hyperparameters_is_that_of_the_last_start(killed: Path, tmp_path: Path) -> None:
    shutil.copytree(killed / "bare", tmp_path / "bare")
    wait_for_next_second()
    train(logger_of(tmp_path, "bare", default_hp_metric=False))
    metrics, values = rows_of(tmp_path / "bare")
    assert "train_loss" in metrics
    assert values["Learning rate"] == repr(Cosine())
