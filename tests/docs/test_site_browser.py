"""The site in a browser: links, pictures, the console, and the search."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from notebooks.run import free_port
from tests.browser import Browser, chromium, wait_for

pytestmark = [pytest.mark.browser, pytest.mark.slow]

# Collects the resolved links, the anchors and the pictures of a page.
PAGE = """
    return {
        links: [...document.links].map(link => link.href),
        anchors: [...document.querySelectorAll("[id]")].map(element => element.id),
        missing: [...document.images].filter(i => i.loading !== "lazy" && !i.naturalWidth)
            .map(image => image.src),
        pictures: document.images.length,
        wide: document.documentElement.scrollWidth - window.innerWidth,
    };
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=site,
    )
    url = f"http://127.0.0.1:{port}/"
    try:
        wait_for(url, b"lightning_bigopt")
        yield url
    finally:
        server.terminate()
        server.wait()


def test_every_page_has_working_links_and_no_console_errors(
    browser: Browser, site: Path, address: str
) -> None:
    """Follows all links from the start page; none is broken, and no page logs an error."""
    browser.console_messages()
    todo, seen, broken = [address + "index.html"], {}, []
    while todo:
        url = todo.pop()
        if url in seen:
            continue
        browser.open(url)
        seen[url] = found = browser.run(PAGE)
        broken += [f"{url}: no picture {picture}" for picture in found["missing"]]
        for link in found["links"]:
            target = link.partition("#")[0].partition("?")[0]
            if link.startswith(address) and target.endswith((".html", "/")):
                todo.append(target + "index.html" if target.endswith("/") else target)
    for url, found in seen.items():
        for link in found["links"]:
            target, _, anchor = link.partition("#")
            if not link.startswith(address):
                continue
            if target in seen and anchor and anchor not in seen[target]["anchors"]:
                broken.append(f"{url}: no anchor {link}")
            path = site / target.removeprefix(address).partition("?")[0]
            if not path.exists():
                broken.append(f"{url}: no page {link}")
    # Chromium always requests a favicon.ico.
    messages = [line for line in browser.console_messages() if "favicon.ico" not in line]
    assert broken == []
    assert messages == []
    written = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    visited = {url.removeprefix(address) for url in seen}
    assert written - visited <= {"search.html", "genindex.html", "py-modindex.html"}
    assert sum(found["pictures"] for found in seen.values()) > 30


@pytest.mark.parametrize("page", ["index.html", "cli.html", "api/gradients.html", "limits.html"])
def test_narrow_window_does_not_scroll_horizontally(
    page: str, browser: Browser, address: str
) -> None:
    browser.ask("/window/rect", {"width": 500, "height": 1250})
    browser.open(address + page)
    try:
        assert browser.run(PAGE)["wide"] <= 0
    finally:
        browser.ask("/window/rect", {"width": 1500, "height": 1250})


@pytest.mark.parametrize(
    ("name", "page"), [("ZClip", "gradients"), ("WarmupStableDecay", "schedules")]
)
def test_search_finds_a_class_by_its_name(
    name: str, page: str, browser: Browser, address: str
) -> None:
    browser.open(f"{address}search.html?q={name}")
    results = "return [...document.querySelectorAll('#search-results a')].map(link => link.href)"
    wanted = f"{address}api/{page}.html#lightning_bigopt.{name}"
    for _ in range(40):
        found = browser.run(results)
        if wanted in found:
            break
        time.sleep(0.25)
    assert wanted in found
