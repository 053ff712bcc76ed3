"""Writes the sections of the page of ``benchmarks/loss_law.py``."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "loss_law.md"


def write_section(title: str, text: str) -> None:
    """Replaces one section of the page in its place, or appends it."""
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else "# Laws of training\n"
    start, *sections = page.split("\n## ")
    titles = [each.partition("\n")[0] for each in sections]
    place = titles.index(title) if title in titles else len(titles)
    sections[place : place + 1] = [f"{title}\n\n{text.rstrip()}\n"]
    PAGE.write_text("\n## ".join([start, *sections]), encoding="utf-8")
