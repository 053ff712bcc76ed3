"""The dashboard and the hyperparameters that are written for TensorBoard."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

from lightning_bigopt import GradientClipping, NormClip, OptimizationMonitor, StepGuard
from lightning_bigopt.monitoring.tensorboard import DASHBOARD, write_dashboard
from tests.helpers import QUIET, Probe, loader
from tests.monitoring.helpers import rows_of

TITLES = [title for charts in DASHBOARD.values() for title in charts]


def charts_of(folder: str | Path) -> dict[str, list[str]]:
    """Returns the charts of the custom-scalars tab of a run, with their tags."""
    events = EventAccumulator(str(folder)).Reload()
    last = events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(last)
    return {
        chart.title: list(chart.multiline.tag) for part in layout.category for chart in part.chart
    }


def train(
    logger: TensorBoardLogger, *callbacks: Any, module: Probe | None = None, **options: Any
) -> None:
    trainer = L.Trainer(
        **{**QUIET, "logger": logger, "max_steps": 4, "log_every_n_steps": 1},
        callbacks=[*callbacks, OptimizationMonitor(every=1, **options)],
    )
    trainer.fit(module or Probe(), loader(16, 2))


class LogsMetrics(Probe):
    """Logs one value under each name."""

    def __init__(self, *names: str, saves: bool = False) -> None:
        super().__init__()
        self.logged_names = names or ("train_loss", "accuracy")
        if saves:
            self.save_hyperparameters({"width": 3})

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log_dict({name: float(self.global_step) for name in self.logged_names})
        return super().training_step(batch, batch_idx)


ALWAYS = {
    "learning rate, planned and used",
    "gradient norm and clip threshold",
    "global batch, planned and used",
    "samples per second",
    "seconds per step",
}


def test_dashboard_has_only_charts_with_values(tmp_path: Path) -> None:
    few, many = (TensorBoardLogger(tmp_path, version=name) for name in ("few", "many"))
    train(few, layers=None)
    train(
        many,
        GradientClipping(NormClip(max_norm=1.0)),
        StepGuard(),
        tokens=lambda batch: 7,
        module=LogsMetrics(),
    )
    assert set(charts_of(few.log_dir)) == ALWAYS
    assert set(charts_of(many.log_dir)) == set(TITLES) - {
        "GPU memory, GiB",
        "noise scale, samples",
        "spike scores of loss and norm",  # after 64 updates
    }


def test_charts_with_the_same_title_have_the_same_tags_in_all_runs(tmp_path: Path) -> None:
    few, many = (TensorBoardLogger(tmp_path, version=name) for name in ("few", "many"))
    train(few, layers=None)
    train(many, GradientClipping(NormClip(max_norm=1.0)))
    first, second = charts_of(few.log_dir), charts_of(many.log_dir)
    assert all(second[title] == tags for title, tags in first.items())


def test_chart_is_added_with_its_first_value(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        write_dashboard(writer, ["optim/lr"])
        write_dashboard(writer, ["optim/lr", "memory/allocated_peak", "memory/reserved_peak"])
        write_dashboard(writer, ["optim/lr"])
    assert set(charts_of(tmp_path)) == {"learning rate, planned and used", "GPU memory, GiB"}


def test_chart_is_added_when_other_tags_disappear(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        write_dashboard(writer, ["optim/lr"])
        write_dashboard(writer, ["memory/allocated_peak"])
    assert set(charts_of(tmp_path)) == {"learning rate, planned and used", "GPU memory, GiB"}


@pytest.mark.parametrize(
    ("saves", "options", "is_logged"),
    [(True, {}, True), (True, {"default_hp_metric": False}, False), (False, {}, False)],
)
def test_hint_to_disable_the_placeholder_metric_is_logged_once(
    saves: bool, options: Any, is_logged: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = TensorBoardLogger(tmp_path, **options)
    with caplog.at_level("INFO"):
        train(logger, module=LogsMetrics(saves=saves))
        train(logger, module=LogsMetrics(saves=saves))
    assert caplog.text.count("default_hp_metric=False") == is_logged


@pytest.mark.parametrize("prefix", ["", "trial"])
@pytest.mark.parametrize("saves", [True, False])
def test_row_of_hyperparameters_is_in_the_run_itself(
    saves: bool, prefix: str, tmp_path: Path
) -> None:
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False, prefix=prefix)
    train(logger, GradientClipping(NormClip(max_norm=1.0)), module=LogsMetrics(saves=saves))
    metrics, values = rows_of(tmp_path)
    before = f"{prefix}-" if prefix else ""
    assert metrics == [f"{before}train_loss", f"{before}accuracy"]
    assert values.get("width") == (3.0 if saves else None)
    assert values["Optimizer"] == "SGD"
    assert values["Base learning rate"] == 0.05
    assert values["Gradient clipping"].startswith("NormClip(max_norm=1.0, ")
    events = EventAccumulator(logger.log_dir).Reload()
    assert set(metrics) <= set(events.Tags()["scalars"])
    assert sorted(values)[:3] == ["Base learning rate", "Gradient clipping", "Optimizer"]
    assert [path for path in Path(logger.log_dir).iterdir() if path.is_dir()] == []


def test_row_with_the_placeholder_of_lightning_stays_the_only_one(tmp_path: Path) -> None:
    train(TensorBoardLogger(tmp_path), module=LogsMetrics(saves=True))
    assert rows_of(tmp_path) == (["hp_metric"], {"width": 3.0})


@pytest.mark.parametrize(
    ("title", "names"),
    [
        ("losses, training and validation", ["loss", "train_loss", "val/loss", "Loss/train"]),
        ("other metrics of the module", ["accuracy", "val/perplexity", "learning", "planets"]),
    ],
)
def test_dashboard_shows_the_metrics_of_the_module(
    title: str, names: list[str], tmp_path: Path
) -> None:
    for number, name in enumerate(names):
        logger = TensorBoardLogger(tmp_path, version=number)
        train(logger, module=LogsMetrics(name))
        charts = charts_of(logger.log_dir)
        of_module = set(charts) & set(DASHBOARD["training"])
        assert of_module == {title}
        tags = EventAccumulator(logger.log_dir).Reload().Tags()["scalars"]
        shown = [tag for tag in tags if any(re.match(pattern, tag) for pattern in charts[title])]
        assert shown == [name]


def test_validation_metric_of_the_last_batch_is_on_the_dashboard(tmp_path: Path) -> None:
    class Validates(Probe):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", 1.0)

    logger = TensorBoardLogger(tmp_path)
    trainer = L.Trainer(
        **{**QUIET, "logger": logger, "max_steps": 4, "limit_val_batches": 1},
        val_check_interval=4,
        check_val_every_n_epoch=None,
        callbacks=[OptimizationMonitor(every=1)],
    )
    trainer.fit(Validates(), loader(16, 2), loader(16, 2))
    assert "losses, training and validation" in charts_of(logger.log_dir)


@pytest.mark.parametrize("prefix", ["", "trial", "a+b"])
def test_dashboard_finds_tags_with_a_prefix(prefix: str, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, prefix=prefix)
    train(logger, layers=None)
    tags = EventAccumulator(logger.log_dir).Reload().Tags()["scalars"]
    for title, patterns in charts_of(logger.log_dir).items():
        found = [tag for tag in tags if any(re.match(pattern, tag) for pattern in patterns)]
        assert found, title
        assert all(tag.startswith(prefix) for tag in found)
