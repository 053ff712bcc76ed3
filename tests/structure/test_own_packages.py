"""Tests import the folders of this checkout, not another package's folders of the same name."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def imported_folders() -> set[str]:
    """Returns the folders of the checkout, besides the package, from which others import."""
    found = set()
    folders = ("benchmarks", "docs", "examples", "notebooks", "tests")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    return {name for name in found if (ROOT / name).is_dir()} - {"lightning_bigopt"}


@pytest.mark.slow
def test_packages_of_the_same_names_do_not_hide_ours(tmp_path: Path) -> None:
    # Opacus 1.6, for example, installs a package "benchmarks". Python prefers a package with an
    # __init__.py to a folder without one, whatever their order on sys.path.
    names = sorted(imported_folders())
    assert names == ["benchmarks", "notebooks", "tests"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import importlib, pathlib\n"
        "def test_folders():\n"
        f"    for name in {names}:\n"
        "        file = pathlib.Path(importlib.import_module(name).__file__)\n"
        f"        assert file.parents[1] == pathlib.Path({str(ROOT)!r})\n"
    )
    # The path of PYTHONPATH is before site-packages. Unlike `python -m pytest`, this command does
    # not put the current folder before both.
    command = [sys.executable, "-c", "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"]
    options = ["-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
    done = subprocess.run(
        [*map(str, [*command, *options, probe])],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
