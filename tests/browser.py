"""Chromium, driven through chromedriver; shared by the tests of TensorBoard and of the site."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

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
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": {"args": flags},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
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

    def open(self, url: str) -> None:
        """Loads a page; returns when it has loaded."""
        self.ask("/url", {"url": url})

    def run(self, script: str) -> Any:
        """What a script returns."""
        return self.ask("/execute/sync", {"script": script, "args": []})

    def text(self, url: str, *words: str) -> str:
        """The text of a page, once it holds some words or has had time enough."""
        self.open("about:blank")
        self.open(url)
        for _ in range(60):
            found: str = self.run(TEXT)
            if all(word in found for word in words) and "Matches (0)" not in found:
                break
            time.sleep(0.5)
        return found

    def complaints(self) -> list[str]:
        """What the console said since the last time."""
        return [entry["message"] for entry in self.ask("/se/log", {"type": "browser"})]

    def picture(self, width: int | None = None) -> bytes:
        """The window as a PNG."""
        if width is not None:
            self.ask("/window/rect", {"width": width, "height": 1250})
        return base64.b64decode(self.ask("/screenshot", method="GET"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    driver = shutil.which("chromedriver")
    assert driver, "chromedriver must be installed; apt-get install -y chromium chromium-driver"
    port = free_port()
    server = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/status", b'"ready":true')
        browser = Browser(f"http://127.0.0.1:{port}", profile)
        yield browser
        browser.ask("", method="DELETE")
    finally:
        server.terminate()
        server.wait()
