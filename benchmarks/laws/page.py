"""Writes the sections of the page of ``benchmarks/loss_law.py``."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "loss_law.md"


def write_section(title: str, text: str) -> None:
    """Replaces one section of the page, or appends it."""
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else "# Laws of training\n"
    start, *sections = page.split("\n## ")
    sections = [each for each in sections if not each.startswith(f"{title}\n")]
    sections.append(f"{title}\n\n{text}")
    PAGE.write_text("\n## ".join([start, *sections]), encoding="utf-8")
