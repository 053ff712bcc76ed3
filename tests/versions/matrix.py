"""The tests under every version of Lightning, each in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from tests.versions.environments import environment, installed

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "versions"
VERSIONS = ("2.5.0", "2.5.6", "2.6.0", "2.6.6")
# The columns of the table and what runs for them.
SETS = {
    "contract": ["tests/lightning_contract"],
    "end to end": ["tests/versions", "tests/cli/test_fit.py"],
}
ENGINE = {"engine": ["tests/engine"]}  # takes four times as long as the others


class Result(NamedTuple):
    """One test: its name; ``passed``, ``failed``, ``xfailed`` or ``skipped``; and the reason."""

    test: str
    outcome: str
    reason: str


def results(report: Path) -> list[Result]:
    """Returns the results in an XML report of pytest."""
    found = []
    for case in ET.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        outcome, reason = "passed", ""
        for child in case:
            if child.tag in {"failure", "error"}:
                outcome, reason = "failed", (child.get("message") or "").split("\n")[0]
            elif child.tag == "skipped":
                outcome = "xfailed" if child.get("type") == "pytest.xfail" else "skipped"
                reason = child.get("message") or ""
        found.append(Result(name, outcome, reason))
    return found


def tested(python: Path, paths: list[str], report: Path, packages: str) -> list[Result]:
    """Runs tests in an environment; returns their results."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:cov", f"--junitxml={report}"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "BIGOPT_TEST_PACKAGES": packages,
        # Lightning 2.5.0 calls a function of jsonargparse that has been deprecated since.
        "JSONARGPARSE_DEPRECATION_WARNINGS": "off",
    }
    environment.pop("CI", None)  # older versions skip what they lack; the table says what
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", *options, *paths]
    subprocess.run(command, cwd=ROOT, env=environment, check=False)
    return results(report) if report.exists() else [Result("collection", "failed", "no report")]


def count(found: Iterable[Result]) -> str:
    """Returns the number of results of each outcome in words."""
    outcomes = [result.outcome for result in found]
    kinds = ("passed", "failed", "xfailed", "skipped")
    return ", ".join(f"{outcomes.count(kind)} {kind}" for kind in kinds if kind in outcomes)


def measure(
    versions: Iterable[str] = VERSIONS, packages: str = "lightning.pytorch"
) -> tuple[str, bool]:
    """Returns the table of the versions and what did not pass, and whether nothing failed."""
    rows = [
        f"| Lightning | {' | '.join(SETS)} | installed for it |",
        "|---" * (len(SETS) + 2) + "|",
    ]
    differences: dict[tuple[str, str], list[str]] = {}
    failed = False
    for version in versions:
        print(f"== Lightning {version}", flush=True)
        python = environment(FOLDER / version, version)
        cells = []
        for name, paths in SETS.items():
            report = FOLDER / f"{version}-{name.replace(' ', '-')}.xml"
            found = tested(python, paths, report, packages)
            cells.append(count(found))
            for result in found:
                if result.outcome != "passed":
                    where = (result.test.partition("[")[0], f"{result.outcome}: {result.reason}")
                    differences.setdefault(where, []).append(version)
                failed |= result.outcome == "failed"
        ours = {"lightning", "pytorch-lightning", "lightning-bigopt"}
        others = {n: v for n, v in installed(python).items() if n not in ours}
        cells.append(", ".join(f"{n} {v}" for n, v in sorted(others.items())) or "none")
        rows.append(f"| {version} | {' | '.join(cells)} |")
    lines = [
        f"- `{test}` ({', '.join(dict.fromkeys(under))}) {reason}"
        for (test, reason), under in differences.items()
    ]
    title = f"Python {sys.version.split()[0]}, torch {metadata.version('torch')}, `{packages}`:"
    return "\n".join([title, "", *rows, "", *lines]).strip(), not failed
