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
        **{**QUIET, "logger": logger, "max_steps": 4},
        callbacks=[*callbacks, OptimizationMonitor(every=1, **options)],
    )
    trainer.fit(module or Probe(), loader(16, 2))


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
    train(many, GradientClipping(NormClip(max_norm=1.0)), StepGuard(), tokens=lambda batch: 7)
    assert set(charts_of(few.log_dir)) == ALWAYS
    assert set(charts_of(many.log_dir)) == set(TITLES) - {
        "GPU memory, GiB",
        "noise scale, samples",
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


@pytest.mark.parametrize(
    ("saves", "options", "is_logged"),
    [(True, {}, True), (True, {"default_hp_metric": False}, False), (False, {}, False)],
)
def test_hint_to_disable_the_placeholder_metric(
    saves: bool, options: Any, is_logged: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class ModuleWithHyperparameters(Probe):
        def __init__(self, width: int = 3) -> None:
            super().__init__()
            if saves:
                self.save_hyperparameters()

    with caplog.at_level("INFO"):
        train(TensorBoardLogger(tmp_path, **options), module=ModuleWithHyperparameters())
    assert ("default_hp_metric=False" in caplog.text) is is_logged


@pytest.mark.parametrize("prefix", ["", "trial", "a+b"])
def test_dashboard_finds_tags_with_a_prefix(prefix: str, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, prefix=prefix)
    train(logger, layers=None)
    tags = EventAccumulator(logger.log_dir).Reload().Tags()["scalars"]
    for title, patterns in charts_of(logger.log_dir).items():
        found = [tag for tag in tags if any(re.match(pattern, tag) for pattern in patterns)]
        assert found, title
        assert all(tag.startswith(prefix) for tag in found)
