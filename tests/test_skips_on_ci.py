"""A test skipped for a missing dependency fails on CI, and is skipped elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = """
import pytest

def test_missing_dependency():
    pytest.importorskip("nowhere_to_be_found")

@pytest.mark.gpu
def test_gpu(): ...

@pytest.mark.xfail(reason="known", strict=True)
def test_known():
    assert False
"""
MODULE = 'import pytest\npytest.importorskip("nowhere_to_be_found")\n'


@pytest.mark.slow
@pytest.mark.parametrize(("ci", "failures"), [("true", 2), ("", 0)])
def test_skips_fail_on_ci_only(ci: str, failures: int, tmp_path: Path):
    shutil.copy(Path(__file__).parent / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "test_some.py").write_text(SOURCE)
    (tmp_path / "test_module.py").write_text(MODULE)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors", "-p", "no:cov"],
        cwd=tmp_path,
        env={**os.environ, "CI": ci, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == (1 if failures else 0), result.stdout
    assert result.stdout.count("skipped on CI, which must run everything") >= failures
    assert "1 xfailed" in result.stdout
