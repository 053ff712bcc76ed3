"""Runs the tests under other versions of Lightning, and checks every version of Python.

python -m tests.versions                     # everything; takes about half an hour
python -m tests.versions lightning           # Lightning only; python: Python only
python -m tests.versions --only 2.5.0        # one version of Lightning
python -m tests.versions lightning --package pytorch_lightning   # the Trainer of the other package
python -m tests.versions --write             # writes the section of docs/compatibility.md
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from tests.versions import interpreters, matrix

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
PARTS = ("lightning", "python")
BEGIN, END = "<!-- {}: begin -->", "<!-- {}: end -->"


def written(page: str, part: str, table: str) -> str:
    """Returns the page with the table of a part between its two comments."""
    begin, end = BEGIN.format(part), END.format(part)
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise ValueError(f"{PAGE.name} must contain one pair of {begin} and {end}; add it")
    return pattern.sub(lambda _: f"{begin}\n{table}\n{end}", page)


def main() -> int:
    """Runs the chosen parts, prints their tables, and writes them on request."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}")
    parser.add_argument("--only", nargs="+", default=matrix.VERSIONS, metavar="VERSION")
    parser.add_argument("--package", default="lightning.pytorch", help="the Trainer's package")
    parser.add_argument("--engine", action="store_true", help="run tests/engine too")
    parser.add_argument("--jobs", type=int, default=1, help="versions at the same time")
    parser.add_argument("--write", action="store_true", help=f"write the tables into {PAGE.name}")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"PART must be one of {', '.join(PARTS)}, got {', '.join(unknown)}")
    everything = True
    for part in options.parts or PARTS:
        if part == "lightning":
            table, passed = matrix.measure(
                options.only, package=options.package, engine=options.engine, jobs=options.jobs
            )
        else:
            table, passed = interpreters.measure()
        print(f"\n{table}\n", flush=True)
        everything &= passed
        if options.write:
            page = PAGE.read_text(encoding="utf-8")
            PAGE.write_text(written(page, f"versions of {part}", table), encoding="utf-8")
    return 0 if everything else 1


if __name__ == "__main__":
    raise SystemExit(main())
