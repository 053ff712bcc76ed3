"""The site builds without a warning, and documents every public name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lightning_bigopt
from lightning_bigopt.reporting.charts import CHARTS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_DOCUMENTED = re.compile(
    r"^\.\. (?:auto(?:class|function)|py:data):: (\w+)$|^\.\. (?:py:)?currentmodule:: (\S+)$",
    re.MULTILINE,
)


def documented() -> list[str]:
    """Returns the full names that the reference documents."""
    names = []
    for page in sorted((DOCS / "api").glob("*.md")):
        module = None
        for name, named_module in _DOCUMENTED.findall(page.read_text()):
            module = named_module or module
            if name:
                names.append(f"{module}.{name}")
    return names


def test_every_public_name_is_documented_once():
    names = documented()
    assert len(names) == len(set(names))
    assert {f"lightning_bigopt.{name}" for name in lightning_bigopt.__all__} <= set(names)


def test_every_chart_is_explained():
    page = (DOCS / "guides" / "reading_charts.md").read_text()
    shown = re.findall(r"^```{chart} (.+)$", page, re.MULTILINE)
    titles = [chart.title for chart in CHARTS]
    without_picture = ["GPU memory"]  # the page is built without a GPU
    assert sorted([*shown, *without_picture]) == sorted(titles)
    for tag in ("memory/allocated_peak", "memory/reserved_peak", "guard/rejected"):
        assert tag in page, tag


@pytest.mark.slow
def test_public_names_are_in_the_inventory(site):
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    found = {name for kind in inventory.data.values() for name in kind}
    assert {f"lightning_bigopt.{name}" for name in lightning_bigopt.__all__} <= found


@pytest.mark.slow
def test_search_finds_every_public_name(site):
    index = (site / "searchindex.js").read_text()
    missing = [name for name in lightning_bigopt.__all__ if f'"{name}"' not in index]
    assert not missing


@pytest.mark.slow
def test_links_and_pictures_inside_the_site_exist(site):
    pages = list(site.rglob("*.html"))
    anchors = {page: set(re.findall(r'\bid="([^"]+)"', page.read_text())) for page in pages}
    broken = []
    for page in pages:
        for link in re.findall(r'\b(?:href|src)="([^"]+)"', page.read_text()):
            path, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link):
                continue
            target = (page.parent / path.partition("?")[0]).resolve() if path else page
            known = not anchor or target not in anchors or anchor in anchors[target]
            if not target.exists() or not known:
                broken.append(f"{page.relative_to(site)}: {link}")
    assert len(pages) > 10
    assert not broken


@pytest.mark.slow
def test_pages_load_nothing_from_other_hosts(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|iframe)\b[^>]*\bsrc="(https?:[^"]*)"'
            r'|<link\b[^>]*\brel="(?:stylesheet|preload)"[^>]*\bhref="(https?:[^"]*)"',
            page.read_text(),
        )
        assert not loaded, page


@pytest.mark.slow
def test_fractions_are_rendered_correctly(site):
    page = (site / "algorithms.html").read_text()
    assert re.search(r"<mfrac>\s*<mn>1</mn>|<mfrac>\s*<mrow>\s*<mn>1</mn>", page)
    assert "<mn>12</mn>" not in page
