"""Every version of Python: the files compile, mypy finds no error, and what needs no torch runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = (
    "lightning_bigopt",
    "tests",
    "benchmarks",
    "notebooks",
    "docs/conf.py",
    "docs/_extensions",
)
MINORS = range(10, 15)
# Imports the modules of the package without its __init__.py, which imports torch, and runs the
# examples of those that need the standard library only.
EXAMPLES = """
import doctest, importlib, pkgutil, sys, types
package = types.ModuleType("lightning_bigopt")
package.__path__ = ["lightning_bigopt"]
sys.modules["lightning_bigopt"] = package
# Without modules whose examples need other packages: lightning, matplotlib, jinja2.
without = ("lightning_bigopt.reporting", "lightning_bigopt.trainer_access")
modules = []
for found in pkgutil.walk_packages(package.__path__, "lightning_bigopt.", onerror=print):
    if found.name.startswith(without):
        continue
    try:
        modules.append(importlib.import_module(found.name))
    except ModuleNotFoundError as error:
        if error.name.startswith("lightning_bigopt"):
            raise
for module in modules:
    vars(package).update({name: getattr(module, name) for name in getattr(module, "__all__", ())})
options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
results = [doctest.testmod(module, optionflags=options) for module in modules]
print(len(modules), sum(r.attempted for r in results), sum(r.failed for r in results))
"""


def interpreter(minor: int) -> str | None:
    """Returns the command of an installed Python 3.minor, on PATH or of pyenv; None without one."""
    pyenv = sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))
    current = [sys.executable] if sys.version_info.minor == minor else []
    for command in [*current, shutil.which(f"python3.{minor}"), *map(str, pyenv)]:
        code = "import sys; print(sys.version_info.minor)"
        if command is not None:
            done = subprocess.run(
                [command, "-c", code], capture_output=True, text=True, check=False
            )
            if done.stdout.strip() == str(minor):
                return command
    return None


def compiled(command: str) -> str:
    """Compiles all files, warnings as errors; returns the interpreter's version, or the error."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [command, "-W", "error", "-m", "compileall", "-q", *FOLDERS],
            cwd=ROOT,
            env=os.environ | {"PYTHONPYCACHEPREFIX": folder},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        return f"✗ {done.stdout.strip().splitlines()[-1]}"
    version = subprocess.run([command, "-V"], capture_output=True, text=True, check=True).stdout
    return version.split()[1]


def examples_run(command: str) -> str:
    """Runs the examples of the modules that need no torch; returns how many there were."""
    # -S: without the packages of the interpreter, of which one may be torch.
    done = subprocess.run(
        [command, "-S", "-B", "-W", "error", "-c", EXAMPLES],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = re.fullmatch(r"(\d+) (\d+) (\d+)", done.stdout.strip().splitlines()[-1])
    if done.returncode or found is None:
        return f"✗ {done.stderr.strip().splitlines()[-1]}"
    modules, examples, failures = map(int, found.groups())
    return f"{examples} examples of {modules} modules, {failures} failed"


def checked(minor: int) -> str:
    """Runs mypy for a version of Python; returns its last line."""
    command = [sys.executable, "-m", "mypy", "--python-version", f"3.{minor}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1]
    return "no errors" if done.returncode == 0 else f"✗ {last}"


def measure() -> tuple[str, bool]:
    """Returns the table of the versions of Python, and whether all checks passed."""
    rows = ["| Python | compiled with | mypy | run |", "|---|---|---|---|"]
    for minor in MINORS:
        command = interpreter(minor)
        typed = checked(minor)
        if command is None:
            cells = ["no interpreter", typed, "nothing"]
        elif minor == sys.version_info.minor:
            cells = [compiled(command), typed, "all tests"]
        else:
            cells = [compiled(command), typed, examples_run(command)]
        rows.append(f"| 3.{minor} | {' | '.join(cells)} |")
    return "\n".join(rows), not any(re.search(r"✗|[1-9]\d* failed", row) for row in rows)
