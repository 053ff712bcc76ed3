"""Chromium, controlled through chromedriver, for the tests of TensorBoard and of the site."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from notebooks.run import free_port

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
# TensorBoard's charts are in shadow roots, which are not part of the page's source or text.
TEXT = """
    const walk = node => [...node.childNodes].map(child =>
        child.nodeType === 3 ? child.textContent :
        child.nodeType !== 1 || ["STYLE", "SCRIPT"].includes(child.tagName) ? "" :
        (child.shadowRoot ? walk(child.shadowRoot) : "") + " " + walk(child)).join(" ");
    return walk(document.body);
"""


class Browser:
    """A session of Chromium over the WebDriver protocol."""

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
        """Loads a page; returns when it has loaded, after 30 seconds at the latest."""
        self.ask("/url", {"url": url})
        # The driver may return while a long page is still read.
        for _ in range(300):
            if self.run("return document.readyState") == "complete":
                break
            time.sleep(0.1)

    def run(self, script: str) -> Any:
        """Runs a script and returns its result."""
        return self.ask("/execute/sync", {"script": script, "args": []})

    def text(self, url: str, *words: str) -> str:
        """Returns the text of a page when it contains the words, after 30 seconds at the latest."""
        self.open("about:blank")
        self.open(url)
        for _ in range(60):
            found: str = self.run(TEXT)
            if all(word in found for word in words) and "Matches (0)" not in found:
                break
            time.sleep(0.5)
        return found

    def console_messages(self) -> list[str]:
        """Returns the console messages since the last call."""
        return [entry["message"] for entry in self.ask("/se/log", {"type": "browser"})]

    def picture(self, width: int | None = None) -> bytes:
        """Returns the window as a PNG."""
        if width is not None:
            self.ask("/window/rect", {"width": width, "height": 1250})
        return base64.b64decode(self.ask("/screenshot", method="GET"))


def wait_for(url: str, word: bytes) -> None:
    """Waits until a page contains a word; fails after a minute."""
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
    """Starts chromedriver and a browser with a profile folder; ends both on exit."""
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
