"""Importing the package costs next to nothing once Lightning is there."""

from __future__ import annotations

import statistics
import subprocess
import sys

import pytest

PROBE = """
import lightning, time
start = time.process_time()
import lightning_bigopt
print(time.process_time() - start)
"""
OPTIONAL = "import lightning_bigopt, sys; print(*sys.modules)"


def run(source: str) -> str:
    command = [sys.executable, "-c", source]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_import_adds_at_most_a_fifth_of_a_second_to_lightning():
    assert statistics.median(float(run(PROBE)) for _ in range(3)) <= 0.2


def test_import_brings_no_optional_dependency():
    loaded = set(run(OPTIONAL).split())
    assert "lightning_bigopt.callbacks" in loaded
    assert not loaded & {"jsonargparse", "matplotlib", "transformers"}
