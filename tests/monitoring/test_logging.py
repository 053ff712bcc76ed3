"""Values written to loggers: axes, prefixes, histograms, planned curves and hyperparameters."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.tensorflow_stub.io import gfile
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_bigopt import (
    Backoff,
    BatchSizeScheduler,
    ConstantBatchSize,
    GradientClipping,
    LearningRateScheduler,
    NonFinite,
    NormClip,
    OptimizationMonitor,
    ReduceOnPlateau,
    StepGuard,
    WarmupCosine,
)
from lightning_bigopt.reporting.runs import read_run
from tests.helpers import Probe, RaisesAtStep, ResumableLoader, SaveAt, fit, loader
from tests.monitoring.helpers import (
    Blocks,
    batch_tokens,
    curves,
    curves_in_tensorboard,
)


def test_logged_update_is_one_event(tmp_path: Path) -> None:
    trainer = fit(
        Blocks(),
        loader(16, 2),
        OptimizationMonitor(every=2, layers="parameters"),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    (file,) = Path(trainer.log_dir).glob("events*")
    ours = [
        (event.step, len(event.summary.value))
        for event in EventFileLoader(str(file)).Load()
        if any(v.tag == "grad_norm/total" for v in event.summary.value)
    ]
    assert [step for step, _ in ours] == [1, 3, 5, 7]
    assert all(count > 40 for _, count in ours)


@pytest.mark.parametrize(("axis", "each"), [("samples", 4), ("tokens", 40)])
def test_x_axis_counts_consumed_samples_or_tokens(axis: Any, each: int, tmp_path: Path) -> None:
    trainer = fit(
        Blocks(),
        loader(16, 4),
        OptimizationMonitor(every=1, x_axis=axis, tokens=batch_tokens),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    steps = [step for step, _ in curves(trainer)["grad_norm/total"]]
    assert steps == [each, 2 * each, 3 * each, 4 * each]


def test_budget_in_tokens_has_a_planned_curve_on_the_token_axis(tmp_path: Path) -> None:
    def run(version: str, *more: Any, **options: Any) -> L.Trainer:
        schedule = LearningRateScheduler(
            WarmupCosine(warmup="25%"), budget="320 tokens", tokens=batch_tokens
        )
        return fit(
            Blocks(),
            ResumableLoader(64, 4),
            schedule,
            OptimizationMonitor(every=1, x_axis="tokens"),
            *more,
            max_epochs=-1,
            logger=TensorBoardLogger(tmp_path, version=version),
            **options,
        )

    straight = curves(run("straight"))
    planned, used = dict(straight["plan/lr"]), straight["optim/lr"]
    assert (min(planned), max(planned), len(planned)) == (0, 320, 201)
    assert [at for at, _ in used] == [40 * update for update in range(1, 9)]
    # An update is logged at the tokens where it ended; its learning rate is that of its start.
    assert [rate for _, rate in used] == [pytest.approx(planned[at - 40]) for at, _ in used]
    save = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=3, save_top_k=-1)
    with pytest.raises(ZeroDivisionError):
        run("failed", save, RaisesAtStep(5, ZeroDivisionError()), enable_checkpointing=True)
    time.sleep(1 - time.time() % 1)
    resumed = run("failed", ckpt_path=tmp_path / "saved" / "epoch=0-step=3.ckpt")
    found = curves_in_tensorboard(resumed)
    for tag in ("plan/lr", "optim/lr"):
        assert found[tag] == straight[tag], tag


def test_budget_in_epochs_has_no_planned_curve_on_the_token_axis(tmp_path: Path) -> None:
    trainer = fit(
        Blocks(),
        loader(16, 4),
        LearningRateScheduler(WarmupCosine(warmup="25%")),
        OptimizationMonitor(every=1, x_axis="tokens", tokens=batch_tokens),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    found = curves(trainer)
    assert len(found["optim/lr"]) == 4
    assert not [tag for tag in found if tag.startswith("plan/")]


def test_token_axis_without_a_token_count_raises() -> None:
    with pytest.raises(ValueError, match="tokens must be counted for x_axis='tokens'"):
        fit(Blocks(), loader(8, 4), OptimizationMonitor(x_axis="tokens"), max_epochs=1)


def test_every_logger_gets_the_same_values(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path), CSVLogger(tmp_path / "csv")]
    fit(
        Blocks(),
        loader(16, 4),
        OptimizationMonitor(every=2),
        max_epochs=1,
        logger=loggers,
        log_every_n_steps=1,
    )
    events, table = (read_run(logger.log_dir).curves for logger in loggers)
    shared = [tag for tag in table if tag.startswith("layers/") or tag == "grad_norm/total"]
    assert len(shared) > 15
    for tag in shared:
        assert events[tag] == [(step, pytest.approx(value)) for step, value in table[tag]]


def test_prefix_of_the_logger_is_on_all_tags(tmp_path: Path) -> None:
    trainer = fit(
        Blocks(),
        loader(16, 4),
        LearningRateScheduler(WarmupCosine(warmup="20%")),
        OptimizationMonitor(every=1, histograms_every=2),
        max_epochs=1,
        log_every_n_steps=1,
        logger=TensorBoardLogger(tmp_path, prefix="G+"),
    )
    events = EventAccumulator(trainer.log_dir).Reload()
    tags = events.Tags()
    texts = [tag for tag in tags["tensors"] if tag.endswith("text_summary")]
    assert all(tag.startswith("G+-") for tag in tags["scalars"] + tags["histograms"] + texts)
    assert texts
    assert tags["histograms"]
    layout = layout_pb2.Layout.FromString(
        events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    )
    patterns = [t for c in layout.category for chart in c.chart for t in chart.multiline.tag]
    assert re.escape("G+-") + "optim/lr.*" in patterns
    for pattern in patterns:
        if "clip/threshold" not in pattern:  # nothing is clipped here
            assert any(re.match(pattern, tag) for tag in tags["scalars"]), pattern


def test_histograms_show_the_gradient_before_clipping(tmp_path: Path) -> None:
    module = Blocks()
    trainer = fit(
        module,
        loader(16, 4),
        GradientClipping(NormClip(max_norm=1e-3)),
        OptimizationMonitor(histograms_every=2, layers=None),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    events = EventAccumulator(trainer.log_dir, size_guidance={"histograms": 0})
    events.Reload()
    found = events.Histograms("histograms/grad/head.weight")
    assert [event.step for event in found] == [1, 3]
    truth = module.seen[1]["grads"]["head.weight"]
    assert found[0].histogram_value.num == truth.numel()
    assert found[0].histogram_value.max == pytest.approx(float(truth.max()), rel=1e-6)


def test_run_resumed_into_another_folder_has_the_planned_curve(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=2, save_top_k=-1)
    options: dict[str, Any] = {"enable_checkpointing": True, "max_steps": 8}
    schedule = WarmupCosine(warmup="20%")
    fit(Blocks(), ResumableLoader(16, 4), LearningRateScheduler(schedule), save, **options)
    trainer = fit(
        Blocks(),
        ResumableLoader(16, 4),
        LearningRateScheduler(schedule),
        OptimizationMonitor(every=1),
        max_steps=8,
        ckpt_path=tmp_path / "saved" / "epoch=0-step=2.ckpt",
        logger=TensorBoardLogger(tmp_path, version="elsewhere"),
    )
    run = read_run(trainer.log_dir)
    assert "WarmupCosine" in run.texts["plan"]
    assert [step for step, _ in run.curves["plan/lr"]] == [2, 3, 4, 5, 6, 7]


class ReadsLog(L.Callback):
    """Saves after every batch, and reads the last logged step from the files as after a kill."""

    def __init__(self, tag: str, path: Path) -> None:
        self.tag, self.path = tag, path
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.save_checkpoint(self.path)
        events = EventAccumulator(trainer.log_dir).Reload()
        if self.tag in events.Tags()["scalars"]:
            self.steps.append(events.Scalars(self.tag)[-1].step)


@pytest.mark.parametrize(
    ("callback", "tag"),
    [
        (OptimizationMonitor(), "grad_norm/total"),
        (BatchSizeScheduler(ConstantBatchSize(4)), "batch/planned_size"),
    ],
    ids=["monitor", "no monitor"],
)
def test_values_are_in_the_file_when_a_checkpoint_is_saved(
    callback: Any, tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system without appending, such as S3, gets the data of a file when it is flushed."""
    monkeypatch.delattr(gfile.LocalFileSystem, "append")
    reads = ReadsLog(tag, tmp_path / "saved.ckpt")
    fit(
        Probe(),
        ResumableLoader(16, 4),
        callback,
        reads,
        max_steps=4,
        log_every_n_steps=1,
        logger=TensorBoardLogger(tmp_path),
    )
    assert reads.steps == [0, 1, 2, 3]


class RisingLoss(Blocks):
    """Logs a loss that never improves, and trains on NaN once."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        step = self.trainer.global_step
        self.log("rising", float(step), on_epoch=True)
        return super().training_step(batch, batch_idx) * (math.nan if step == 1 else 1.0)


def test_measured_factors_on_the_learning_rate_are_not_planned_after_a_resume(
    tmp_path: Path,
) -> None:
    """The factors of a backoff and a plateau recover or shrink in ways that are not known."""

    def train(name: str, *callbacks: Any, **options: Any) -> dict[str, dict[int, float]]:
        trainer = fit(
            RisingLoss(),
            ResumableLoader(8, 4),
            LearningRateScheduler(WarmupCosine(warmup="20%")),
            StepGuard([NonFinite()], actions=[Backoff(recover=100)]),
            ReduceOnPlateau("rising", patience=0, check="train_epoch"),
            OptimizationMonitor(every=1),
            *callbacks,
            max_steps=12,
            log_every_n_steps=1,
            logger=TensorBoardLogger(tmp_path, version=name),
            **options,
        )
        return {tag: dict(points) for tag, points in curves(trainer).items()}

    straight = train("straight", SaveAt(tmp_path / "saved.ckpt", 5))
    resumed = train("resumed", ckpt_path=tmp_path / "saved.ckpt")
    first, second = straight["plan/lr"], resumed["plan/lr"]
    assert second == {step: value for step, value in first.items() if step >= 5}
    used = next(tag for tag in straight if tag.startswith("optim/lr"))
    assert straight[used][5] < 0.5 * first[5]
    assert resumed[used] == {step: v for step, v in straight[used].items() if step >= 5}


def test_plan_is_logged_as_text(tmp_path: Path) -> None:
    trainer = fit(
        Blocks(),
        loader(16, 4),
        LearningRateScheduler(WarmupCosine(warmup="20%")),
        OptimizationMonitor(every=1),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    assert "WarmupCosine" in read_run(trainer.log_dir).texts["plan"]
