"""TensorBoard in a browser shows the dashboard and the other tabs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    GradientClipping,
    LearningRateScheduler,
    NormClip,
    OptimizationMonitor,
    StepGuard,
    WarmupCosine,
)
from lightning_bigopt.monitoring.tensorboard import DASHBOARD
from notebooks.run import free_port
from tests.browser import Browser, chromium, wait_for
from tests.helpers import QUIET, Probe, loader


class LoggingModule(Probe):
    def __init__(self, lr: float) -> None:
        super().__init__(lr=lr, optimizer=torch.optim.AdamW)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log_dict({"train_loss": loss, "accuracy": 1 - loss})
        return loss


pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("logs")
    logger = TensorBoardLogger(folder, version="one", default_hp_metric=False)
    trainer = L.Trainer(
        **{**QUIET, "logger": logger, "log_every_n_steps": 1},
        max_epochs=10,
        callbacks=[
            LearningRateScheduler(WarmupCosine(warmup="20%")),
            GradientClipping(NormClip(max_norm=6.0)),
            BatchSizeScheduler(BatchSizeSteps({"0%": 4, "50%": 8})),
            StepGuard(),
            OptimizationMonitor(histograms_every=10, tokens=lambda batch: batch[0].numel()),
        ],
    )
    trainer.fit(LoggingModule(lr=0.01), loader(32, 4))
    port = free_port()
    options = ["--logdir", ".", "--host", "127.0.0.1", "--port", str(port), "--load_fast", "false"]
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
    )
    url = f"http://127.0.0.1:{port}/"
    try:
        wait_for(f"{url}data/plugin/scalars/tags", b"plan/lr")
        yield url
    finally:
        server.terminate()
        server.wait()


# They need a GPU, GradientNoiseScale, or more updates.
WITHOUT_VALUES = {"GPU memory, GiB", "noise scale, samples", "spike scores of loss and norm"}
TITLES = [t for charts in DASHBOARD.values() for t in charts if t not in WITHOUT_VALUES]


def test_dashboard_shows_its_charts(browser: Browser, address: str, tmp_path: Path) -> None:
    page = browser.text(f"{address}#custom_scalars", *TITLES, "Matches (2)")
    assert [title for title in TITLES if title not in page] == []
    assert "Matches (0)" not in page  # every chart has curves
    assert not [title for title in WITHOUT_VALUES if title in page]
    time.sleep(2)  # the curves are drawn
    picture = browser.picture()
    target = Path(os.environ.get("SCREENSHOT") or tmp_path / "tensorboard.png")
    target.write_bytes(picture)
    assert len(picture) > 60_000


@pytest.mark.parametrize(
    ("tab", "words"),
    [
        ("timeseries", ["optim", "grad_norm", "layers"]),
        ("text", ["WarmupCosine", "budget"]),
        ("histograms", ["net.0.weight"]),
        ("hparams", ["Learning rate", "train_loss", "NormClip(max_norm=6.0", "groups: 1"]),
    ],
)
def test_other_tabs_have_content(
    tab: str, words: list[str], browser: Browser, address: str
) -> None:
    page = browser.text(f"{address}#{tab}", *words)
    assert [word for word in words if word not in page] == []
    assert "hp_metric" not in page
