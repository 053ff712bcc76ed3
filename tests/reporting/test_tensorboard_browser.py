"""TensorBoard in a real browser finds what was written for it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
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
    WarmupCosine,
)
from tests.kit import QUIET, Probe, loader

pytestmark = [pytest.mark.browser, pytest.mark.slow]

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--window-size=1500,1250 --virtual-time-budget=60000 --timeout=90000"
).split()


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("google-chrome")
    assert found, "chromium must be installed, got none; try: apt-get install -y chromium"
    return found


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("logs")
    trainer = L.Trainer(
        **{**QUIET, "logger": TensorBoardLogger(folder, version="one"), "log_every_n_steps": 1},
        max_epochs=10,
        callbacks=[
            LearningRateScheduler(WarmupCosine(warmup="20%")),
            GradientClipping(NormClip(max_norm=6.0)),
            BatchSizeScheduler(BatchSizeSteps({"0%": 4, "50%": 8})),
            OptimizationMonitor(histograms_every=10),
        ],
    )
    trainer.fit(Probe(lr=0.01, optimizer=torch.optim.AdamW), loader(32, 4))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port),
         "--host", "127.0.0.1", "--load_fast", "false"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ,
    )
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(120):
            try:
                if b"plan/lr" in urllib.request.urlopen(f"{url}data/plugin/scalars/tags").read():
                    break
            except OSError:
                pass
            time.sleep(0.5)
        yield url
    finally:
        server.kill()
        server.wait()


def browse(chromium: str, url: str, profile: Path, *more: str) -> str:
    done = subprocess.run(
        [chromium, *FLAGS, f"--user-data-dir={profile}", *(more or ("--dump-dom",)), url],
        capture_output=True, text=True, timeout=180, check=False,
    )
    return done.stdout


def test_the_dashboard_shows_its_charts(chromium: str, address: str, tmp_path: Path) -> None:
    page = browse(chromium, f"{address}#custom_scalars", tmp_path)
    for title in (
        "learning rate, planned and used",
        "gradient norm and clip threshold",
        "global batch, planned and used",
        "update-to-weight ratio",
    ):
        assert title in page, title


def test_the_scalars_are_found(chromium: str, address: str, tmp_path: Path) -> None:
    page = browse(chromium, f"{address}?tagFilter=optim%2Flr#timeseries", tmp_path)
    assert "optim/lr" in re.sub(r"<[^>]+>", "", page)


@pytest.mark.parametrize(("tab", "word"), [("text", "WarmupCosine"), ("histograms", "net.0.weight")])
def test_the_other_tabs_have_content(
    tab: str, word: str, chromium: str, address: str, tmp_path: Path
) -> None:
    assert word in browse(chromium, f"{address}#{tab}", tmp_path)


def test_a_screenshot_has_content(chromium: str, address: str, tmp_path: Path) -> None:
    target: Any = os.environ.get("SCREENSHOT") or tmp_path / "tensorboard.png"
    browse(chromium, f"{address}#custom_scalars", tmp_path / "p", f"--screenshot={target}")
    assert Path(target).stat().st_size > 30_000
