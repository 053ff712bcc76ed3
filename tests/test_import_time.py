"""The time to import the package beside Lightning."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_NO_BYTECODE = "PYTHONDONTWRITEBYTECODE"
PROBE = """
import time
start = time.process_time()
import lightning
middle = time.process_time()
import lightning_bigopt
print((time.process_time() - middle) / (middle - start))
"""
ADDED = """
import sys, lightning
before = {name.split(".")[0] for name in sys.modules}
import lightning_bigopt
print(*({name.split(".")[0] for name in sys.modules} - before))
"""


def run(source: str) -> str:
    command = [sys.executable, "-c", source]
    # The bytecode of an installed package is compiled, as that of Lightning is here.
    writes = {name: value for name, value in os.environ.items() if name != _NO_BYTECODE}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=writes).stdout


@pytest.mark.slow
def test_import_takes_at_most_a_twentieth_of_that_of_lightning():
    # 0.2 s of Lightning's 4 s. The minimum, because other processes can only add to a share.
    assert min(float(run(PROBE)) for _ in range(5)) <= 0.05


@pytest.mark.slow
def test_import_loads_only_the_package_and_the_standard_library_beside_lightning():
    assert set(run(ADDED).split()) - sys.stdlib_module_names == {"lightning_bigopt"}
