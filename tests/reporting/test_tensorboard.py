"""What TensorBoard finds in a run's files beyond its scalars."""

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
from lightning_bigopt.reporting.tensorboard import DASHBOARD, write_dashboard
from tests.kit import QUIET, Probe, loader

TITLES = [title for charts in DASHBOARD.values() for title in charts]


def charts_of(folder: str | Path) -> dict[str, list[str]]:
    """The charts that the custom-scalars tab of a run would lay out, with their tags."""
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


def test_the_dashboard_has_no_chart_that_the_run_cannot_fill(tmp_path: Path) -> None:
    few, many = (TensorBoardLogger(tmp_path, version=name) for name in ("few", "many"))
    train(few, layers=None)
    train(many, GradientClipping(NormClip(max_norm=1.0)), StepGuard(), tokens=lambda batch: 7)
    assert set(charts_of(few.log_dir)) == ALWAYS
    assert set(charts_of(many.log_dir)) == set(TITLES) - {
        "GPU memory, GiB",
        "noise scale, samples",
    }


def test_charts_of_one_title_are_equal_or_tensorboard_would_show_both(tmp_path: Path) -> None:
    few, many = (TensorBoardLogger(tmp_path, version=name) for name in ("few", "many"))
    train(few, layers=None)
    train(many, GradientClipping(NormClip(max_norm=1.0)))
    first, second = charts_of(few.log_dir), charts_of(many.log_dir)
    assert all(second[title] == tags for title, tags in first.items())


def test_a_chart_comes_with_its_first_value(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        write_dashboard(writer, ["optim/lr"])
        write_dashboard(writer, ["optim/lr", "memory/allocated_peak", "memory/reserved_peak"])
        write_dashboard(writer, ["optim/lr"])
    assert set(charts_of(tmp_path)) == {"learning rate, planned and used", "GPU memory, GiB"}


@pytest.mark.parametrize(
    ("saves", "options", "told"),
    [(True, {}, True), (True, {"default_hp_metric": False}, False), (False, {}, False)],
)
def test_who_hides_the_final_metrics_behind_a_placeholder_is_told(
    saves: bool, options: Any, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Saving(Probe):
        def __init__(self, width: int = 3) -> None:
            super().__init__()
            if saves:
                self.save_hyperparameters()

    with caplog.at_level("INFO"):
        train(TensorBoardLogger(tmp_path, **options), module=Saving())
    assert ("default_hp_metric=False" in caplog.text) is told


@pytest.mark.parametrize("prefix", ["", "trial", "a+b"])
def test_the_dashboard_finds_tags_behind_a_prefix(prefix: str, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, prefix=prefix)
    train(logger, layers=None)
    tags = EventAccumulator(logger.log_dir).Reload().Tags()["scalars"]
    for title, patterns in charts_of(logger.log_dir).items():
        found = [tag for tag in tags if any(re.match(pattern, tag) for pattern in patterns)]
        assert found, title
        assert all(tag.startswith(prefix) for tag in found)
