"""TensorBoard in a real browser finds what was written for it."""

from __future__ import annotations

import base64
import json
import os
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
from lightning_bigopt.reporting.tensorboard import DASHBOARD
from tests.kit import QUIET, Probe, loader


class Logging(Probe):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


pytestmark = [pytest.mark.browser, pytest.mark.slow]

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1500,1250",
]
# TensorBoard's charts live in shadow roots, which neither the page's source nor its text holds.
TEXT = """
    const walk = node => [...node.childNodes].map(child =>
        child.nodeType === 3 ? child.textContent :
        child.nodeType !== 1 || ["STYLE", "SCRIPT"].includes(child.tagName) ? "" :
        (child.shadowRoot ? walk(child.shadowRoot) : "") + " " + walk(child)).join(" ");
    return walk(document.body);
"""


class Browser:
    """Chromium through the WebDriver protocol."""

    def __init__(self, driver: str, profile: Path) -> None:
        flags = [*FLAGS, f"--user-data-dir={profile}"]
        wanted = {"browserName": "chrome", "goog:chromeOptions": {"args": flags}}
        self.driver = driver
        self.session = ""
        answer = self.ask("", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"/{answer['sessionId']}"

    def ask(self, what: str, body: Any = None, method: str = "POST") -> Any:
        request = urllib.request.Request(
            f"{self.driver}/session{self.session}{what}",
            data=None if method != "POST" else json.dumps(body or {}).encode(),
            method=method,
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())["value"]

    def text(self, url: str, *words: str) -> str:
        """The text of a page, once it holds some words or has had time enough."""
        self.ask("/url", {"url": "about:blank"})
        self.ask("/url", {"url": url})
        for _ in range(60):
            found: str = self.ask("/execute/sync", {"script": TEXT, "args": []})
            if all(word in found for word in words) and "Matches (0)" not in found:
                break
            time.sleep(0.5)
        return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    driver = shutil.which("chromedriver")
    assert driver, "chromedriver must be installed; apt-get install -y chromium chromium-driver"
    port = free_port()
    server = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/status", b'"ready":true')
        browser = Browser(f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("profile"))
        yield browser
        browser.ask("", method="DELETE")
    finally:
        server.terminate()
        server.wait()


def wait_for(url: str, word: bytes) -> None:
    for _ in range(120):
        try:
            with urllib.request.urlopen(url) as answer:
                if word in answer.read():
                    return
        except OSError:
            pass
        time.sleep(0.5)
    pytest.fail(f"{url} did not come up")


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
    trainer.fit(Logging(lr=0.01, optimizer=torch.optim.AdamW), loader(32, 4))
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


TITLES = [title for charts in DASHBOARD.values() for title in charts]


def test_the_dashboard_shows_its_charts(browser: Browser, address: str, tmp_path: Path) -> None:
    page = browser.text(f"{address}#custom_scalars", *TITLES, "Matches (2)")
    assert [title for title in TITLES if title not in page] == []
    assert "Matches (0)" not in page  # every chart has curves
    time.sleep(2)  # the curves are drawn
    picture = base64.b64decode(browser.ask("/screenshot", method="GET"))
    target = Path(os.environ.get("SCREENSHOT") or tmp_path / "tensorboard.png")
    target.write_bytes(picture)
    assert len(picture) > 60_000


@pytest.mark.parametrize(
    ("tab", "words"),
    [
        ("timeseries", ["optim", "grad_norm", "layers"]),
        ("text", ["WarmupCosine", "budget"]),
        ("histograms", ["net.0.weight"]),
        ("hparams", ["base lr", "train_loss"]),
    ],
)
def test_the_other_tabs_have_content(
    tab: str, words: list[str], browser: Browser, address: str
) -> None:
    page = browser.text(f"{address}#{tab}", *words)
    assert [word for word in words if word not in page] == []
