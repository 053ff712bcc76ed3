"""Kills runs, passes hostile arguments, and makes processes and disks fail, many times.

    python benchmarks/faults.py                  # every part; takes about an hour
    python benchmarks/faults.py kills            # one part
    python benchmarks/faults.py kills --write    # writes its section of docs/benchmarks/faults.md

The tests run a few cases of every part (`tests/faults`).
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "faults.md"
PARTS = {
    "kills": "Killed and resumed runs",
    "constructors": "Arguments of constructors",
    "trained_runs": "Random configurations that are trained",
    "ranks": "Faults on one of two processes",
    "disks": "Full, read-only and deleted folders",
    "slurm": "Signals of SLURM",
    "long_run": "A run of 100,000 steps",
}
INTRODUCTION = """\
# Faults

Each section is written by `python benchmarks/faults.py PART --write`.
"""


def written_sections(text: str) -> dict[str, str]:
    """Returns the sections of the page by their titles."""
    blocks = text.split("\n## ")[1:]
    return {title: body.strip() for title, _, body in (block.partition("\n") for block in blocks)}


def main() -> None:
    """Runs the chosen parts, prints their results, and writes them on request."""
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}")
    parser.add_argument("--write", action="store_true", help=f"write sections of {PAGE.name}")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"PART must be one of {', '.join(PARTS)}, got {', '.join(unknown)}")
    for part in arguments.parts or PARTS:
        result = import_module(f"tests.faults.{part}").measure().strip()
        print(f"## {PARTS[part]}\n\n{result}\n", flush=True)
        if arguments.write:
            sections = written_sections(PAGE.read_text("utf-8")) if PAGE.exists() else {}
            sections[PARTS[part]] = f"`python benchmarks/faults.py {part} --write`\n\n{result}"
            known = [title for title in PARTS.values() if title in sections]
            bodies = (f"\n## {title}\n\n{sections[title]}\n" for title in known)
            PAGE.write_text(INTRODUCTION + "".join(bodies), encoding="utf-8")


if __name__ == "__main__":
    main()
