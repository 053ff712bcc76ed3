"""``OptimizationMonitor(event_folder=)``: events for the report beside any logger."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from lightning_bigopt import (
    Cosine,
    GradientClipping,
    LearningRateScheduler,
    NonFinite,
    NormClip,
    OptimizationMonitor,
    StepGuard,
    plan,
)
from lightning_bigopt.cli.__main__ import main
from lightning_bigopt.reporting.runs import read_run
from tests.helpers import QUIET, RaisesAtStep, ResumableLoader, fit, loader
from tests.monitoring.helpers import MEASURED_TIMES, Blocks, rows_of

UPDATES = 12


class MinimalLogger(Logger):
    """A logger of a user, with the abstract methods of Lightning's class and nothing else."""

    name = "mine"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


class RejectedOnce(Blocks):
    """Has a loss that is not finite at update 2, hyperparameters, and a validation loss."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"width": 6})

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx == 2 else loss

    def val_dataloader(self) -> Any:
        return loader(16, 8)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.head(self.embed(batch[0])).square().mean())


def train(logger: Any, *more: Any, monitor: Any = None, **options: Any) -> L.Trainer:
    return fit(
        RejectedOnce(),
        ResumableLoader(96, 8),
        *more,
        LearningRateScheduler(Cosine()),
        GradientClipping(NormClip(max_norm=1.0)),
        StepGuard([NonFinite()]),
        OptimizationMonitor(every=1, **(monitor or {})),
        **{"max_steps": UPDATES, "logger": logger, "log_every_n_steps": 1, **options},
    )


def without_times(curves: Any) -> dict[str, Any]:
    # As text, because a norm that is not finite is not equal to itself.
    return {tag: repr(curve) for tag, curve in curves.items() if not tag.startswith(MEASURED_TIMES)}


@pytest.mark.parametrize("make", [MinimalLogger, bool, CSVLogger], ids=["own", "none", "csv"])
def test_folder_holds_what_a_tensorboard_logger_stores(make: Any, tmp_path: Path) -> None:
    folder = tmp_path / "events"
    logger = make(tmp_path / "csv") if make is CSVLogger else make()
    other = TensorBoardLogger(tmp_path / "other", default_hp_metric=False)
    train(other, monitor={"histograms_every": 4})
    trainer = train(logger, monitor={"histograms_every": 4, "event_folder": str(folder)})
    assert trainer.loggers == ([logger] if logger else [])
    expected, found = read_run(other.log_dir), read_run(folder)
    assert without_times(found.curves) == without_times(expected.curves)
    assert {"train_loss", "val_loss", "plan/lr", "optim/lr"} <= found.curves.keys()
    assert (found.texts, found.refusals) == (expected.texts, expected.refusals)
    assert len(found.refusals) == 1
    assert rows_of(folder) == rows_of(other.log_dir)
    assert {path.name.split(".")[0] for path in folder.glob("*") if path.is_file()} == {"events"}


def test_logger_with_abstract_methods_only_gets_the_values(tmp_path: Path) -> None:
    logger, csv = MinimalLogger(), CSVLogger(tmp_path)
    train([logger, csv])
    table = read_run(csv.log_dir).curves
    for tag in ("optim/lr", "clip/coefficient", "guard/skipped", "train_loss", "val_loss"):
        logged = [(step, float(row[tag])) for step, row in logger.rows if tag in row]
        assert repr(logged) == repr(table[tag]), tag


@pytest.mark.slow
def test_report_is_written_without_a_readable_logger(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, page = tmp_path / "events", tmp_path / "at_end.html"
    train(MinimalLogger(), monitor={"report": str(page), "event_folder": str(folder)})
    again = tmp_path / "again.html"
    assert main(["report", str(folder), "--output", str(again)]) == 0
    # Matplotlib gives random names to the parts of a picture.
    first, second = (re.sub("(?s)<svg.*?</svg>", "", p.read_text()) for p in (page, again))
    assert first == second
    for content in ("train_loss", "Why updates were rejected", "budget", "learning rate"):
        assert content in page.read_text()


@pytest.mark.slow
def test_report_prefers_events_to_a_table(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")]
    train(loggers, monitor={"report": str(tmp_path / "r.html")})
    assert "Why updates were rejected" in (tmp_path / "r.html").read_text()


def test_report_without_logs_names_event_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got MinimalLogger; write event_folder='runs/events' bes"):
        train(MinimalLogger(), monitor={"report": str(tmp_path / "r.html")})
    with pytest.raises(ValueError, match=r"or of OptimizationMonitor\(event_folder=\)"):
        read_run(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["updates", "samples"])
def test_resumed_run_replaces_the_values_after_its_checkpoint(axis: Any, tmp_path: Path) -> None:
    def run(name: str, *more: Any, **options: Any) -> Any:
        monitor = {"event_folder": str(tmp_path / name), "x_axis": axis}
        return train(MinimalLogger(), *more, monitor=monitor, **options)

    run("straight")
    save = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=4, save_top_k=-1)
    with pytest.raises(ZeroDivisionError):
        run("failed", save, RaisesAtStep(7, ZeroDivisionError()), enable_checkpointing=True)
    time.sleep(1 - time.time() % 1)  # the names of event files contain the second
    run("failed", ckpt_path=tmp_path / "saved" / "epoch=0-step=4.ckpt")
    straight, resumed = read_run(tmp_path / "straight"), read_run(tmp_path / "failed")
    of_monitor = [tag for tag in straight.curves if "loss" not in tag or axis == "updates"]
    for tag in without_times(dict.fromkeys(of_monitor)):
        assert repr(resumed.curves[tag]) == repr(straight.curves[tag]), tag
    assert resumed.refusals == straight.refusals


@pytest.mark.slow
def test_new_run_replaces_the_events_of_an_earlier_one(tmp_path: Path) -> None:
    train(False, monitor={"event_folder": str(tmp_path)})
    time.sleep(1 - time.time() % 1)
    train(False, monitor={"event_folder": str(tmp_path)}, max_steps=5)
    assert [step for step, _ in read_run(tmp_path).curves["optim/lr"]] == list(range(5))


def test_second_fit_of_a_trainer_continues(tmp_path: Path) -> None:
    trainer = train(False, monitor={"event_folder": str(tmp_path)}, max_steps=5)
    trainer.fit_loop.epoch_loop.max_steps = 9
    trainer.fit(RejectedOnce(), loader(96, 8))
    assert [step for step, _ in read_run(tmp_path).curves["grad_norm/total"]] == list(range(9))


def test_finder_plan_and_fast_dev_run_write_nothing(tmp_path: Path) -> None:
    monitor = OptimizationMonitor(every=1, event_folder=str(tmp_path / "events"))
    callbacks = [LearningRateScheduler(Cosine()), monitor]
    trainer = L.Trainer(**QUIET, max_steps=4, callbacks=callbacks)
    plan(trainer, Blocks(), loader(32, 8))
    fit(Blocks(), loader(32, 8), *callbacks, fast_dev_run=True)
    assert not (tmp_path / "events").exists()
    assert trainer.loggers == []


def test_values_of_the_learning_rate_finder_are_left_out(tmp_path: Path) -> None:
    class Tuned(Blocks):
        lr = 0.1

        def configure_optimizers(self) -> Any:
            self.options["lr"] = self.lr
            return super().configure_optimizers()

    monitor = OptimizationMonitor(every=1, event_folder=str(tmp_path / "events"))
    finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
    trainer = fit(
        Tuned(),
        loader(96, 8),
        finder,
        monitor,
        max_steps=6,
        log_every_n_steps=1,
        enable_checkpointing=True,
        default_root_dir=tmp_path,
    )
    curves = read_run(tmp_path / "events").curves
    assert [step for step, _ in curves["grad_norm/total"]] == list(range(6))
    assert curves["train_loss"][-1][0] == 5
    assert trainer.loggers == []


def test_checkpoints_stay_where_they_were(tmp_path: Path) -> None:
    save = ModelCheckpoint()
    options = {"enable_checkpointing": True, "default_root_dir": tmp_path / "root"}
    train(False, save, monitor={"event_folder": str(tmp_path / "events")}, **options)
    assert Path(save.best_model_path).is_relative_to(tmp_path / "root")


def test_error_removes_the_logger(tmp_path: Path) -> None:
    folder = tmp_path / "events"
    logger = MinimalLogger()
    trainer = L.Trainer(
        **QUIET | {"logger": logger},
        max_steps=8,
        log_every_n_steps=1,
        callbacks=[
            RaisesAtStep(5, ZeroDivisionError()),
            OptimizationMonitor(event_folder=str(folder)),
        ],
    )
    with pytest.raises(ZeroDivisionError):
        trainer.fit(Blocks(), loader(96, 8))
    assert trainer.loggers == [logger]
    assert len(read_run(folder).curves["grad_norm/total"]) == 5


def test_folder_of_a_tensorboard_logger_raises(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, version="mine")
    expected = f"event_folder must not be the folder .*, got {re.escape(repr(logger.log_dir))}; rem"
    with pytest.raises(ValueError, match=expected):
        train(logger, monitor={"event_folder": logger.log_dir})


def test_histograms_that_no_logger_stores_warn(tmp_path: Path) -> None:
    message = "histograms to TensorBoard only, got MinimalLogger, CSVLogger; write event_folder="
    with pytest.warns(UserWarning, match=message):
        train([MinimalLogger(), CSVLogger(tmp_path)], monitor={"histograms_every": 3})


def test_full_disk_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", fails)  # with which Lightning logs
    with pytest.warns(UserWarning, match="could not write .*No space left") as warned:
        train(False, monitor={"event_folder": str(tmp_path)})
    assert len([w for w in warned if "could not write" in str(w.message)]) == 1
    assert len(read_run(tmp_path).curves["optim/lr"]) == UPDATES
