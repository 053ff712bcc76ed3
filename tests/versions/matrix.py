"""The tests under every version of Lightning, each in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from tests.versions.environments import environment, installed

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "versions"
VERSIONS = ("2.5.0", "2.5.6", "2.6.0", "2.6.6")
FIT = "tests/cli/test_fit.py"
# The columns of the table and what runs for them.
SETS = {
    "contract": ["tests/lightning_contract"],
    "end to end": [
        "tests/versions",
        f"{FIT}::test_example_trains_and_its_saved_config_trains_to_the_same_weights",
    ],
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
                outcome, reason = (
                    "failed",
                    (child.get("message") or "").replace(str(ROOT), "").split("\n")[0][:120],
                )
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


def of_version(version: str, sets: dict[str, list[str]], package: str) -> dict[str, list[Result]]:
    """Makes an environment with a version of Lightning; returns the results of each set."""
    python = environment(FOLDER / version, version)
    return {
        name: tested(python, paths, FOLDER / f"{version}-{name.replace(' ', '-')}.xml", package)
        for name, paths in sets.items()
    }


def others(version: str) -> str:
    """Returns the packages that an environment holds besides Lightning and this one."""
    found = installed(FOLDER / version / "bin" / "python")
    ours = {"lightning", "pytorch-lightning", "lightning-bigopt"}
    return ", ".join(f"{n} {v}" for n, v in sorted(found.items()) if n not in ours) or "none"


def measure(
    versions: Iterable[str] = VERSIONS,
    *,
    package: str = "lightning.pytorch",
    engine: bool = False,
    jobs: int = 1,
) -> tuple[str, bool]:
    """Returns the table of the versions and what did not pass, and whether nothing failed."""
    sets = SETS | ENGINE if engine else SETS
    with ThreadPoolExecutor(jobs) as pool:
        found = list(pool.map(lambda version: of_version(version, sets, package), versions))
    rows = [
        f"| Lightning | {' | '.join(sets)} | installed for it |",
        f"|{'---|' * (len(sets) + 2)}",
    ]
    differences: dict[str, list[str]] = {}
    for version, of_sets in zip(versions, found, strict=True):
        cells = [*(count(of_sets[name]) for name in sets), others(version)]
        rows.append(f"| {version} | {' | '.join(cells)} |")
        for result in (result for name in sets for result in of_sets[name]):
            if result.outcome != "passed":
                test = result.test.partition("[")[0]
                line = f"`{test}`: {result.outcome}, {result.reason}"
                differences.setdefault(line, []).append(version)
    lines = [f"- {', '.join(dict.fromkeys(under))}: {line}" for line, under in differences.items()]
    title = f"Python {sys.version.split()[0]}, torch {metadata.version('torch')}, `{package}`:"
    failed = any(r.outcome == "failed" for of_sets in found for s in of_sets.values() for r in s)
    return "\n".join([title, "", *rows, "", *lines]).strip(), not failed
